from .features import FeatureExtractor, Pixels, extract_features
from .knn import best_knn, knn_accuracy, knn_predict
from .loader import create_eval_loader, eval_crop_pct
