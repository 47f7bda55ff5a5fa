"""What the verbs share: a run is put together, checked, handed on."""
