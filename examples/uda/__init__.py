"""The rooms of the domain-adaptation example: data, model, adaptation, evaluation, pictures."""
