"""Image files: facts of their headers, and their pixels as arrays."""
