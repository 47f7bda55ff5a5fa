"""The demo: procedural street scenes. Nothing else of `iccld` imports them."""
