"""Adaptive sparse attention: which keys are left out, decided from what a layer sees."""
