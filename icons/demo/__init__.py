"""The parts of `icons demo` that are not the command itself."""
