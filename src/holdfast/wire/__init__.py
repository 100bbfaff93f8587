"""Frames and the connection state machine (no I/O), then the TCP shell around it."""
