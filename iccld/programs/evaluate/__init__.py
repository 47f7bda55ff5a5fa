"""`iccld evaluate`, and models averaged out of snapshots."""
