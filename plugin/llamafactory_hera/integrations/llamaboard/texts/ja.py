"""Japanese."""

FIELDS = {
    "hera_heads": (
        "アテンションヘッド",
        "L13H12,L7H6 のような名前、heads.json のパス、または学習前に自動選択する auto。",
    ),
    "hera_objective": ("目的関数", "最小化する対象。contrastive が HeRA の損失。"),
    "hera_granularity": ("粒度", "アテンションヘッド (head) またはデコーダー層 (layer) を揃える。"),
    "hera_layers": (
        "デコーダー層",
        "粒度が layer の場合：L14,L15 のような名前、layers.json のパス、または middle、penultimate、auto。",
    ),
    "hera_teacher": ("教師モデル", "固定された視覚モデル：ローカルフォルダーまたはハブの名前。"),
    "hera_teacher_cache": ("教師特徴のキャッシュ", "教師の特徴を保存するフォルダー（任意）。"),
    "hera_weight": ("HeRA の重み", "HeRA 損失の重み（lambda）。"),
    "hera_k": ("近傍数 (k)", "教師空間での最近傍の数。"),
    "hera_temperature": ("温度", "温度の初期値。"),
    "hera_fixed_temperature": ("温度を固定", "温度を学習しません。"),
    "hera_pooling": ("プーリング", "ヘッドを平均するトークンの範囲。"),
    "hera_similarity": ("類似度", "表現どうしの類似度。"),
    "hera_memory": ("メモリ", "追加候補とする最近のサンプル数。"),
    "hera_accumulate": ("累積方法", "候補：マイクロバッチ内（none）またはステップ全体（gradcache）。"),
    "hera_select": ("選択方法", "どのヘッドを選ぶか。"),
    "hera_select_m": ("選択するヘッド数 (m)", "論文の推奨は 5 以下。"),
    "hera_select_mode": ("選択モード", "llm：キャプションのみ、mllm：画像とテキスト。"),
    "hera_select_samples": ("選択用サンプル数", "採点に使う画像とキャプションの組。"),
    "hera_select_k": ("選択時の近傍数", "採点時の最近傍の数。"),
    "hera_select_batch_size": ("選択時のバッチサイズ", "1 回の順伝播のサンプル数。"),
}

WIDGETS = {
    "hera_tab": {"label": "HeRA 設定"},
    "hera_heads_file": {
        "label": "以前の選択結果",
        "info": "heads.json のパスを選ぶか入力すると、使用して表示できます。",
    },
    "hera_select_btn": {"value": "ヘッドを選択"},
    "hera_compare_btn": {"value": "ヘッドを比較"},
    "hera_stop_btn": {"value": "採点を中断"},
    "hera_compare": {"label": "学習後に比較", "info": "学習が終わったらヘッドをもう一度採点します。"},
    "hera_gallery": {"label": "画像"},
    "hera_report": {"label": "レポート"},
}

MESSAGES = {
    "no_heads": "HeRA 設定でアテンションヘッドを入力するか、「ヘッドを選択」を押すか、auto と入力してください。",
    "select_layers": "粒度が layer です。デコーダー層に auto と入力すると、学習開始時に選択されます。",
    "selecting": "ヘッドを選択しています…",
    "comparing": "学習後のモデルのヘッドを採点しています…",
    "teacher": "教師モデル",
    "scoring pass": "採点",
    "selected": "選択されたヘッド：{heads}。{path} に保存され、このパスがヘッド欄に入りました。",
    "loaded": "ヘッド：{heads}（{path}）。",
    "no_scores": "このファイルには採点結果がないため、画像はありません。",
    "compared": "学習前と学習後：",
    "not_trained": "{folder} に完了した学習がありません。先に学習するか、完了した学習の出力先を選んでください。",
    "failed": "失敗しました。終了コード {code}。",
    "aborted": "中断しました。",
    "heads_picture": "ヘッド",
    "report_picture": "学習前と学習後",
}
