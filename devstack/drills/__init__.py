"""Drills: on the embedded stack, under load, one fault; then the proof that nothing is lost and nothing twice."""
