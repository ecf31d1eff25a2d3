"""From a user's network to the prepared one: an fx.GraphModule of the modules in `operators.OPERATORS`."""
