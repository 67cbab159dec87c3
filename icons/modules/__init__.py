"""Lightning modules and callbacks: warm-up, extractor, exact scorer, writers, metrics."""
