from .features import Pixels, create_eval_loader, eval_crop_pct, extract_features
from .knn import best_knn, knn_accuracy, knn_predict
