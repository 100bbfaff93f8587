"""Instance discovery: who is there. See `contract` for the promises and `factory` for the backends."""
