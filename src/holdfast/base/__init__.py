"""Ground floor: ids, errors, limits, settings, seeded randomness. Imports nothing of Holdfast above it."""
