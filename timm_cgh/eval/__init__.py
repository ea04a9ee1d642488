from .features import create_eval_loader, eval_crop_pct, extract_features, pixel_features
from .knn import best_knn, knn_accuracy, knn_predict
