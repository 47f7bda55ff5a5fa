"""`iccld ablate`: named settings x seeds, trained, compared with one of them, and reported."""
