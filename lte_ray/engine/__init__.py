"""The engine: a head and a coordinator as plain classes, and a loop that runs them without Ray."""
