"""English."""

FIELDS = {
    "hera_heads": (
        "Attention heads",
        "Names such as L13H12,L7H6, the path of a heads.json, or auto to select them before training.",
    ),
    "hera_objective": ("Objective", "What is minimised; contrastive is HeRA's."),
    "hera_granularity": ("Granularity", "Align attention heads or whole decoder layers."),
    "hera_layers": (
        "Decoder layers",
        "For granularity layer: names such as L14,L15, the path of a layers.json, or middle, penultimate, auto.",
    ),
    "hera_teacher": ("Teacher", "Frozen vision model: a local folder or a hub id."),
    "hera_teacher_cache": ("Teacher cache", "Folder that keeps the teacher's features (optional)."),
    "hera_weight": ("HeRA weight", "Weight (lambda) of the HeRA loss."),
    "hera_k": ("Neighbours (k)", "Nearest neighbours in the teacher's space."),
    "hera_temperature": ("Temperature", "Its initial value."),
    "hera_fixed_temperature": ("Fixed temperature", "Do not learn it."),
    "hera_pooling": ("Pooling", "Tokens that a head is averaged over."),
    "hera_similarity": ("Similarity", "Of representations."),
    "hera_memory": ("Memory", "Recent samples as further candidates."),
    "hera_accumulate": ("Accumulation", "Candidates: of the micro-batch (none) or of the whole step (gradcache)."),
    "hera_select": ("Selection strategy", "Which heads are selected."),
    "hera_select_m": ("Heads to select (m)", "5 at most, says the paper."),
    "hera_select_mode": ("Selection mode", "llm: captions only; mllm: image and text."),
    "hera_select_samples": ("Selection samples", "Image-caption pairs to score on."),
    "hera_select_k": ("Selection neighbours", "Nearest neighbours when scoring."),
    "hera_select_batch_size": ("Selection batch size", "Samples in a forward pass."),
}

WIDGETS = {
    "hera_tab": {"label": "HeRA configurations"},
    "hera_heads_file": {
        "label": "Earlier selection",
        "info": "Choose or type the path of a heads.json to use it and look at it.",
    },
    "hera_select_btn": {"value": "Select heads"},
    "hera_compare_btn": {"value": "Compare heads"},
    "hera_stop_btn": {"value": "Abort scoring"},
    "hera_compare": {
        "label": "Compare after training",
        "info": "Score the heads once more after training.",
    },
    "hera_gallery": {"label": "Pictures"},
    "hera_report": {"label": "Report"},
}

MESSAGES = {
    "no_heads": "Name the attention heads, press Select heads, or write auto (HeRA configurations).",
    "select_layers": "Granularity is layer: write auto as decoder layers, and they are selected when training starts.",
    "selecting": "Selecting heads …",
    "comparing": "Scoring the trained model's heads …",
    "teacher": "Teacher",
    "scoring pass": "Scoring pass",
    "selected": "Selected heads: {heads}. They are in {path}, which is now in the heads field.",
    "loaded": "Heads: {heads}, of {path}.",
    "no_scores": "The file holds no scores, so there is no picture of it.",
    "compared": "Before and after training:",
    "not_trained": "There is no finished run in {folder}: train first, or choose the output dir of a finished run.",
    "failed": "Failed with exit code {code}.",
    "aborted": "Aborted.",
    "heads_picture": "Heads",
    "report_picture": "Before and after training",
}
