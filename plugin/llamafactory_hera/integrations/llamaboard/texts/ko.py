"""Korean."""

FIELDS = {
    "hera_heads": (
        "어텐션 헤드",
        "L13H12,L7H6 같은 이름, heads.json의 경로, 또는 학습 전에 자동으로 선택하려면 auto.",
    ),
    "hera_objective": ("목적 함수", "최소화할 대상; contrastive가 HeRA의 손실."),
    "hera_granularity": ("정렬 단위", "어텐션 헤드(head) 또는 디코더 레이어(layer)를 정렬."),
    "hera_layers": (
        "디코더 레이어",
        "정렬 단위가 layer일 때: L14,L15 같은 이름, layers.json 경로, 또는 middle, penultimate, auto.",
    ),
    "hera_teacher": ("교사 모델", "고정된 비전 모델: 로컬 폴더 또는 허브 이름."),
    "hera_teacher_cache": ("교사 특징 캐시", "교사 특징을 보관하는 폴더 (선택 사항)."),
    "hera_weight": ("HeRA 가중치", "HeRA 손실의 가중치(lambda)."),
    "hera_k": ("이웃 수 (k)", "교사 공간에서의 최근접 이웃 수."),
    "hera_temperature": ("온도", "온도의 초기값."),
    "hera_fixed_temperature": ("온도 고정", "온도를 학습하지 않습니다."),
    "hera_pooling": ("풀링", "헤드를 평균하는 토큰 범위."),
    "hera_similarity": ("유사도", "표현 사이의 유사도."),
    "hera_memory": ("메모리", "추가 후보로 쓰는 최근 샘플 수."),
    "hera_accumulate": ("누적 방식", "후보: 마이크로 배치(none) 또는 전체 스텝(gradcache)."),
    "hera_select": ("선택 전략", "어떤 헤드를 선택할지."),
    "hera_select_m": ("선택할 헤드 수 (m)", "논문 권장값은 최대 5."),
    "hera_select_mode": ("선택 모드", "llm: 캡션만, mllm: 이미지와 텍스트."),
    "hera_select_samples": ("선택 샘플 수", "점수 계산에 쓰는 이미지-캡션 쌍."),
    "hera_select_k": ("선택 이웃 수", "점수 계산 시 최근접 이웃 수."),
    "hera_select_batch_size": ("선택 배치 크기", "한 번의 순전파에 넣는 샘플 수."),
}

WIDGETS = {
    "hera_tab": {"label": "HeRA 구성"},
    "hera_heads_file": {
        "label": "이전 선택 결과",
        "info": "heads.json의 경로를 고르거나 입력하면 사용하고 볼 수 있습니다.",
    },
    "hera_select_btn": {"value": "헤드 선택"},
    "hera_compare_btn": {"value": "헤드 비교"},
    "hera_stop_btn": {"value": "점수 계산 중단"},
    "hera_compare": {"label": "학습 후 비교", "info": "학습이 끝나면 헤드 점수를 다시 계산합니다."},
    "hera_gallery": {"label": "그림"},
    "hera_report": {"label": "보고서"},
}

MESSAGES = {
    "no_heads": "HeRA 구성에서 어텐션 헤드를 입력하거나, 헤드 선택을 누르거나, auto를 입력하십시오.",
    "select_layers": "정렬 단위가 layer입니다: 디코더 레이어에 auto를 입력하면 학습이 시작될 때 선택됩니다.",
    "selecting": "헤드를 선택하는 중 …",
    "comparing": "학습된 모델의 헤드 점수를 계산하는 중 …",
    "teacher": "교사 모델",
    "scoring pass": "점수 계산",
    "selected": "선택된 헤드: {heads}. {path}에 저장되었고, 이 경로가 헤드 입력란에 들어 있습니다.",
    "loaded": "헤드: {heads} ({path}).",
    "no_scores": "파일에 점수가 없어 그림이 없습니다.",
    "compared": "학습 전과 후:",
    "not_trained": "{folder}에 완료된 학습이 없습니다. 먼저 학습하거나 완료된 학습의 출력 디렉토리를 고르십시오.",
    "failed": "실패했습니다. 종료 코드 {code}.",
    "aborted": "중단되었습니다.",
    "heads_picture": "헤드",
    "report_picture": "학습 전과 후",
}
