"""The parts of `train_embedded_model.py`: text, tokenizer, optimizer, training, measuring and the model card.

Not installed with the package: it is here so that the weights which are can be made again.
"""
