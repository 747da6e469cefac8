"""Options that the numbers of a stage do not depend on, with the reason; see test_fields.

An option that a stage's fingerprint has, or that is refused by its name, does not stand here.
"""

EVERYWHERE = {
    "it names folders, or runs at a tracker": (
        "run_name output_prefix sweep_name data.name model.name paths.* tracker.*"
    ),
    "others are made of it, or launchers, reports, studies and servers' sizes": (
        "run sweep lr_point seeds objectives loss.lrs.* data.path data.format report.* resources "
        "model.secrets model.billions model.gpu"
    ),
    "chat keeps nothing": "chat.*",
}
"""Why numbers do not depend on options, with their names: `a.*` is all of a group, `-a.b` not."""
BEFORE = "prep.* regen.* preprocess.* data.*"
"""What a stage knows by the digest of what it reads."""
OF_TRAINING = "lr epochs max_steps loss.* onpolicy.* target.* trainer.* causal.* pretrain.*"
SEEN = {
    "when it is written or looked at, and what of it is kept": (
        "trainer.log_every trainer.eval_every trainer.save_every trainer.keep_last "
        "trainer.keep_best trainer.profile trainer.dump trainer.resume trainer.restarts"
    ),
    "the same sums in another order, equal but for their last digits": (
        "threads trainer.gpus trainer.shard trainer.pack_tokens trainer.gradient_checkpointing"
    ),
}
OF_MODELS = {
    "it is not read": f"{BEFORE} loss.* draft.* engine.* onpolicy.* target.* bench.*",
    "weights are fp32, and rows of a draft are not made": (
        "model.dtype model.aux_layers model.chat_template_kwargs model.unused_weights"
    ),
    "its export has a fingerprint of its own": "export.*",
    **SEEN,
    "equal but for rounding": "causal.packing causal.attention causal.liger",
}
LAWS: dict[str, dict[str, str]] = {
    "prep": {
        "it is not read": (
            f"{OF_TRAINING} seed max_length device threads model.* draft.* engine.* regen.* "
            "preprocess.* export.* bench.*"
        ),
        "it says how the data set is, or makes it again": "prep.*",
    },
    "regen": {
        "it is not read, or by checks and messages alone": (
            f"{OF_TRAINING} draft.* preprocess.* export.* bench.* model.init"
        ),
        "the prompts' digests have it": "prep.* data.*",
        "the same weights, or a check": "model.unused_weights model.aux_layers",
        "how the same target is served; each record says by which engine": (
            "engine.name engine.server engine.concurrency engine.urls engine.api_key "
            "engine.tp_size engine.num_servers engine.python engine.port engine.gpu "
            "engine.usd_per_gpu_hour engine.image threads"
        ),
        "how fast, and when it gives up": (
            "engine.startup_timeout engine.timeout engine.retries engine.patience engine.rate_limit"
        ),
        "what goes together, and how long an end takes": "regen.chunk_size regen.drain",
        "it says how far it is, or makes it again": "regen.dry_run regen.status regen.force",
    },
    "preprocess": {
        "it is not read, or by checks and report.json alone": (
            f"{OF_TRAINING} seed device threads engine.* export.* bench.* model.dtype "
            "model.init model.aux_layers model.unused_weights"
        ),
        "the conversations' digests have it": "prep.* regen.* data.*",
        "report.json alone counts by it": "draft.* -draft.draft_vocab_size",
        "who encodes, how the same tokens are cut into files, or that it is made again": (
            "preprocess.processes preprocess.shard_tokens preprocess.force"
        ),
    },
    "train": {
        "the tokens' record has it": (f"{BEFORE} model.chat_template_kwargs"),
        "it is not read, or checked alone": (
            "causal.* pretrain.* export.* bench.* engine.* model.init model.unused_weights"
        ),
        **SEEN,
        "likewise, of the target": "target.shard target.tp_size",
        "where the same states are made and kept, or nothing is trained": (
            "target.cache target.placement target.workers target.python target.store "
            "target.buffer_gb target.share target.share_patience target.profile target.alone "
            "target.dry_run onpolicy.dry_run"
        ),
    },
    "cache": {
        "the tokens' record has it": (f"{BEFORE} model.chat_template_kwargs"),
        "states do not depend on it": (
            "lr seed epochs max_steps loss.* onpolicy.* trainer.* causal.* pretrain.* "
            "export.* bench.* engine.* model.init model.unused_weights draft.* -draft.num_features "
            "-draft._target_"
        ),
        "when and where they are made: the same but for their last digits": (
            "device threads target.cache target.shard target.placement target.workers "
            "target.engine target.tp_size target.python target.args target.store "
            "target.buffer_gb target.share target.share_patience target.profile target.alone "
            "target.dry_run"
        ),
    },
    "pretrain": {**OF_MODELS, "the same rows": "pretrain.workers"},
    "sft": {**OF_MODELS, "it is not read here": "pretrain.*"},
    "model's export": {
        "the checkpoint is the training's": (
            f"{OF_TRAINING} {BEFORE} seed max_length device threads model.* draft.* engine.* "
            "bench.*"
        ),
        "drafts alone": "export.format export.source export.push export.private export.dry_run",
        "it is made again where the last one is another": "export.force",
    },
    "export": {
        "the checkpoint is the training's": (
            f"{OF_TRAINING} {BEFORE} seed max_length "
            "device threads engine.* bench.* -bench.chain_length model.dtype model.init "
            "model.chat_template_kwargs model.unused_weights"
        ),
        "what its weights mean is refused by name, this is how they were trained": (
            "draft._target_ draft.name draft.start draft.ttt_length draft.ttt_decay "
            "draft.supervision"
        ),
        "what is made of it, or that it is made again": (
            "export.source export.push export.private export.dry_run export.force"
        ),
    },
    "bench": {
        "the export's record has it": (f"{OF_TRAINING} {BEFORE} export.* model.init"),
        "an export says what it is, and another is refused": (
            "draft.* -draft.block_size -draft.sample_from_anchor -draft.num_depths model.aux_layers"
        ),
        "bench.dtype is the target's type": "model.dtype",
        "the same weights": "model.unused_weights",
        "another engine's, or when it gives up": (
            "engine.server engine.concurrency engine.api_key engine.num_servers engine.port "
            "engine.gpu engine.usd_per_gpu_hour engine.image engine.startup_timeout "
            "engine.timeout engine.retries engine.patience engine.rate_limit"
        ),
        "it is measured again": "bench.force",
    },
}
OF_A_KIND: dict[tuple[str, str], dict[str, str]] = {
    ("cache", "Eagle3Config"): {"P-EAGLE is fed by the same layers": "draft._target_"},
    ("cache", "PEagleConfig"): {"EAGLE-3 is fed by the same layers": "draft._target_"},
    ("train", "DFlashConfig"): {
        "its head is the target's": "draft.draft_vocab_size",
        "equal but for rounding": "draft.attention",
    },
    ("train", "StandaloneConfig"): {"its head is its own": "draft.draft_vocab_size"},
    ("export", "DFlashConfig"): {
        "how it was trained": (
            "draft.draft_vocab_size draft.num_anchors draft.loss_gamma draft.position_weights "
            "draft.dpace_alpha draft.divisor draft.min_loss_tokens draft.attention"
        ),
    },
    ("export", "PEagleConfig"): {
        "how it was trained": (
            "draft.num_depths draft.down_sample_ratio draft.down_sample_ratio_min "
            "draft.max_anchors draft.depth_decay"
        ),
    },
    ("export", "StandaloneConfig"): {
        "how it was trained": "draft.draft_vocab_size draft.init draft.horizon"
    },
}
"""More, of the options of one kind of draft."""
for laws in ("train", "export"):
    OF_A_KIND[laws, "DSparkConfig"] = OF_A_KIND[laws, "DFlashConfig"]
OF_A_KIND["export", "DSparkConfig"] = {
    **OF_A_KIND["export", "DFlashConfig"], "of its training too": "draft.confidence_weight"
}  # fmt: skip
