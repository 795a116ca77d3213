"""What things cost: bytes, parameters, time, memory, this machine's bandwidth; and the report of it."""
