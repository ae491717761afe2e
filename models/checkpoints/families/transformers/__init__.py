"""Networks of Hugging Face's transformers, a module for each family, by `model_type`."""
