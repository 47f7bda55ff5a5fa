"""Parts that verbs share: a run is put together, checked, handed on, and read again."""
