"""TOML to typed, frozen, checked configuration."""
