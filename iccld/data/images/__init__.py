"""Image files: what their own bytes say of them, and their pixels as arrays."""
