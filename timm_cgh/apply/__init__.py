"""A trained network applied to images without labels: embeddings, neighbours, predictions."""
