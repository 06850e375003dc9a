"""What a step needs in memory and time, for a device that need not be there."""
