"""What the tests and the report run on: checkpoints with random weights, and real photographs."""
