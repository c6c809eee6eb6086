"""How good a video is, measured."""
