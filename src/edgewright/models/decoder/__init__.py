"""The one decoder of all language models here: configuration, layers, pretraining, shapes by budget."""
