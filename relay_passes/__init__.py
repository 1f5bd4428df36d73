"""Graph passes over Relax. See README.md of this folder."""
