"""The packaged YAML that Hydra composes; the schema and every default are the dataclasses of `iccld.config`."""
