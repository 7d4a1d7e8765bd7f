"""What a run is: the schema, its loading and validation, and the YAML files people start from."""
