"""Tests: core mirrors the package, systems/<slug>/ holds everything of one system."""
