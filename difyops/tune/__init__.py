"""Training the small models that difyops measures and tests with."""
