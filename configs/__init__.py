"""One config a harm, and the embedded base model's. A package, lest another `configs` win."""
