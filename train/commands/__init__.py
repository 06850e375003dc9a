"""A file a command; none imports another."""
