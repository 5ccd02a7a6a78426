"""What memory is attached to: finding out how a model attends, hooking its attention, and running it."""
