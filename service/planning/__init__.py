"""How many devices a load needs, and how long its requests will take."""
