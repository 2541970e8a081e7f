"""The embedded tiny world: scenes, stories and dialogues made offline, and tiny weights to run on them."""
