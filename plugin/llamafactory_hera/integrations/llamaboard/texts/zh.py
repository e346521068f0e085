"""Chinese."""

FIELDS = {
    "hera_heads": (
        "注意力头",
        "形如 L13H12,L7H6 的名称、heads.json 的路径，或填 auto 在训练前自动选择。",
    ),
    "hera_objective": ("目标函数", "要最小化的内容；contrastive 即 HeRA 的损失。"),
    "hera_granularity": ("粒度", "对齐注意力头 (head) 或整个解码器层 (layer)。"),
    "hera_layers": (
        "解码器层",
        "粒度为 layer 时：形如 L14,L15 的名称、layers.json 的路径，或 middle、penultimate、auto。",
    ),
    "hera_teacher": ("教师模型", "冻结的视觉模型：本地文件夹或模型仓库名称。"),
    "hera_teacher_cache": ("教师特征缓存", "保存教师特征的文件夹（可选）。"),
    "hera_weight": ("HeRA 权重", "HeRA 损失的权重（lambda）。"),
    "hera_k": ("近邻数 (k)", "教师空间中的最近邻个数。"),
    "hera_temperature": ("温度", "温度的初始值。"),
    "hera_fixed_temperature": ("固定温度", "不学习温度。"),
    "hera_pooling": ("池化", "对注意力头求平均的词元范围。"),
    "hera_similarity": ("相似度", "表示之间的相似度。"),
    "hera_memory": ("记忆", "作为额外候选的近期样本数。"),
    "hera_accumulate": ("梯度累积", "候选样本：微批次内（none）或整个更新步（gradcache）。"),
    "hera_select": ("选择策略", "选择哪些注意力头。"),
    "hera_select_m": ("选择数量 (m)", "论文建议不超过 5。"),
    "hera_select_mode": ("选择模式", "llm：仅用描述文本；mllm：图像和文本。"),
    "hera_select_samples": ("选择样本数", "用于评分的图文对数量。"),
    "hera_select_k": ("选择近邻数", "评分时的最近邻个数。"),
    "hera_select_batch_size": ("选择批大小", "一次前向计算的样本数。"),
}

WIDGETS = {
    "hera_tab": {"label": "HeRA 参数设置"},
    "hera_heads_file": {
        "label": "已有的选择结果",
        "info": "选择或输入 heads.json 的路径，以使用并查看它。",
    },
    "hera_select_btn": {"value": "选择注意力头"},
    "hera_compare_btn": {"value": "比较注意力头"},
    "hera_stop_btn": {"value": "中断评分"},
    "hera_compare": {"label": "训练后比较", "info": "训练结束后再次为注意力头评分。"},
    "hera_gallery": {"label": "图片"},
    "hera_report": {"label": "报告"},
}

MESSAGES = {
    "no_heads": "请在 HeRA 参数设置中填写注意力头、点击“选择注意力头”，或填写 auto。",
    "select_layers": "粒度为 layer：请在解码器层中填 auto，训练开始时会自动选择。",
    "selecting": "正在选择注意力头……",
    "comparing": "正在为训练后的模型评分……",
    "teacher": "教师模型",
    "scoring pass": "评分",
    "selected": "已选择的注意力头：{heads}。结果保存在 {path}，该路径已填入注意力头一栏。",
    "loaded": "注意力头：{heads}，来自 {path}。",
    "no_scores": "该文件不含评分，因此没有图片。",
    "compared": "训练前后：",
    "not_trained": "{folder} 中没有已完成的训练：请先训练，或选择一个已完成训练的输出目录。",
    "failed": "失败，退出码 {code}。",
    "aborted": "已中断。",
    "heads_picture": "注意力头",
    "report_picture": "训练前后",
}
