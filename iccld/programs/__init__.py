"""Programs behind the CLI's verbs: each reads a config, puts the parts together and runs them."""
