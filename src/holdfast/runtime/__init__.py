"""Namespaces, components, endpoints and instances; discovery; serving and calling; failure detection."""
