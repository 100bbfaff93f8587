"""The life of one request: stages, deadlines, attempts, migration, leases."""
