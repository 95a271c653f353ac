"""Key names of other trainers and of Hugging Face, each with MegaLite's key of the same meaning.

These names are searched before a similar name is suggested. The most similar name to `save_steps`
is `steps`, which would change the length of the run.
"""

from __future__ import annotations

# MegaLite's key, then its names in Hugging Face, Megatron-LM, nanoGPT, DeepSpeed, Lightning and
# PEFT. A name with a dot applies only to that section, or to the top of the run file if the dot is
# the first character.
_SAME = {
    "name": "run_name experiment_name exp_name job_name wandb_run_name",
    "model.architecture": "model_type architectures",
    "model.vocab_size": "padded_vocab_size n_vocab vocabulary_size",
    "model.hidden_size": "d_model n_embd n_embed embed_dim embedding_dim hidden_dim dim model_dim",
    "model.intermediate_size": "ffn_hidden_size ffn_dim d_ff n_inner ffn_size mlp_hidden_size "
    "feed_forward_dim ff_dim encoder_ffn_dim dim_feedforward",
    "model.num_hidden_layers": "n_layer n_layers num_layers layers depth encoder_layers",
    "model.num_decoder_layers": "decoder_layers",
    "model.num_attention_heads": "n_head n_heads num_heads heads attention_heads "
    "encoder_attention_heads",
    "model.num_key_value_heads": "n_kv_heads num_kv_heads n_kv_head num_query_groups "
    "n_query_groups kv_heads",
    "model.head_dim": "kv_channels d_kv d_head head_size",
    "model.max_position_embeddings": "n_positions n_ctx max_seq_len context_length ctx_len "
    "max_context_length max_sequence_length",
    "model.norm": "normalization norm_type layer_norm_type norm_class_name",
    "model.norm_eps": "rms_norm_eps layer_norm_eps layer_norm_epsilon layernorm_epsilon "
    "norm_epsilon",
    "model.activation": "hidden_act activation_function hidden_activation act_fn "
    "activation_type feed_forward_proj mlp_class_name",
    "model.position_embedding": "position_embedding_type positional_encoding pos_emb "
    "position_encoding",
    "model.rope_theta": "rotary_base rope_base rotary_emb_base",
    "model.tie_word_embeddings": "tie_embeddings weight_tying tied_embeddings",
    "model.attention_bias": "qkv_bias add_qkv_bias",
    "model.initializer_range": "init_method_std init_std initializer_std",
    "model.hidden_dropout": "hidden_dropout_prob resid_pdrop embd_pdrop resid_dropout "
    "dropout_rate dropout_p",
    "model.attention_dropout": "attention_probs_dropout_prob attn_pdrop attn_dropout",
    "model.qk_norm": "qk_layernorm use_qk_norm",
    "data.train": "train_data train_data_path data_path train_path dataset dataset_path datasets "
    "dataset_name train_file train_files dataset_dir data_dir",
    "data.valid": "valid_data valid_data_path validation_file eval_dataset eval_data val_data "
    "validation_data val_path",
    "data.sequence_length": "seq_length seq_len block_size sequence_len max_seq_length "
    "sample_length",
    "data.mask_documents": "reset_attention_mask reset_position_ids document_masking "
    "mask_attention_to_doc",
    "data.seed": "data_seed shuffle_seed",
    "parallel.tensor": "tensor_model_parallel_size tensor_parallel_size tp tp_size tensor_parallel "
    "model_parallel_size mp_size tensor_parallel_degree",
    "parallel.sequence": "sequence_parallel use_sequence_parallel",
    "optimizer.name": "optim optimizer_type optimizer_name",
    "optimizer.lr": "learning_rate max_lr peak_lr base_lr",
    "optimizer.betas": "adam_beta1 adam_beta2 beta1 beta2 adam_betas",
    "optimizer.eps": "adam_epsilon adam_eps epsilon",
    "optimizer.momentum": "sgd_momentum",
    "optimizer.weight_decay": "wd l2",
    "optimizer.clip_grad_norm": "max_grad_norm clip_grad grad_clip gradient_clipping "
    "gradient_clip_val max_norm grad_norm_clip gradient_clip clip_norm",
    "schedule.name": "lr_scheduler_type lr_decay_style scheduler_type lr_schedule "
    "lr_scheduler_name decay_type",
    "schedule.warmup_steps": "num_warmup_steps warmup_iters lr_warmup_iters warmup lr_warmup_steps",
    "schedule.decay_steps": "lr_wsd_decay_iters num_decay_steps schedule.steps",
    "schedule.min_lr_ratio": "min_lr_rate min_lr_factor",
    "training.steps": "max_steps train_iters max_iters num_steps total_steps num_train_steps "
    "train_steps num_training_steps max_train_steps iterations num_iterations n_steps",
    "training.tokens": "max_tokens train_tokens total_tokens num_tokens token_budget",
    "training.global_batch_size": "train_batch_size total_batch_size effective_batch_size",
    "training.micro_batch_size": "per_device_train_batch_size device_batch_size "
    "train_micro_batch_size_per_gpu per_gpu_train_batch_size batch_size_per_device mbs "
    "local_batch_size",
    "training.precision": "dtype torch_dtype mixed_precision amp params_dtype "
    "mixed_precision_param",
    "training.compile": "torch_compile use_torch_compile compile_model",
    "training.seed": "random_seed manual_seed",
    "training.log_every": "logging_steps log_interval log_steps log_every_n_steps log_freq "
    "logging_interval print_every logging.steps logging.interval logging.every",
    "training.eval_every": "eval_steps eval_interval val_check_interval val_interval "
    "validation_interval eval_freq evaluation_steps eval_every_n_steps eval.every eval.interval "
    "eval.steps evaluation.every evaluation.interval evaluation.steps",
    "training.eval_batches": "eval_iters limit_val_batches max_eval_batches eval_num_batches "
    "max_eval_samples val_iters",
    "checkpoint.every": "save_steps save_interval save_every checkpoint_every checkpoint_interval "
    "save_freq ckpt_every ckpt_interval checkpoint_steps every_n_train_steps save_every_n_steps "
    "checkpointing_steps checkpoint.steps checkpoint.interval checkpoint.frequency",
    "checkpoint.keep": "save_total_limit keep_last keep_last_n_checkpoints keep_last_n max_to_keep "
    "save_top_k checkpoints_total_limit max_checkpoints keep_latest_k",
    "checkpoint.keep_best": "load_best_model_at_end save_best",
    "checkpoint.background": "async_save async_checkpointing async_mode",
    "logging.directory": "output_dir out_dir save_dir run_dir log_dir logging_dir ckpt_dir "
    "checkpoint_dir runs_dir default_root_dir logging.dir logging.path checkpoint.dir "
    "checkpoint.directory checkpoint.path checkpoint.folder dump_folder save",
    "logging.tensorboard": "tensorboard_dir use_tensorboard enable_tensorboard",
    "logging.wandb": "use_wandb wandb_log enable_wandb",
    "logging.wandb.project": "wandb_project",
    "logging.wandb.entity": "wandb_entity wandb_team",
    "finetune.task": "task_type problem_type",
    "finetune.metric": "metric_for_best_model best_metric",
    "finetune.early_stopping": "early_stopping_patience patience",
    "finetune.label_smoothing": "label_smoothing_factor",
    "finetune.data.max_target_length": "max_answer_length generation_max_length",
    "finetune.data.text_column": "dataset_text_field text_field text_column_name",
    "finetune.data.label_column": "label_field label_column_name",
    "finetune.data.test_split": "eval_split",
    "finetune.data.valid_split": "validation_split",
    "finetune.data.tokenizer": "tokenizer_name tokenizer_path tokenizer_model "
    "tokenizer_name_or_path tokenizer_dir",
    "finetune.adapter": "lora peft lora_config peft_config use_lora use_peft",
    "finetune.adapter.rank": "lora_r lora_rank r",
    "finetune.adapter.alpha": "lora_alpha",
    "finetune.adapter.dropout": "lora_dropout",
    "finetune.adapter.targets": "target_modules lora_target_modules lora_target",
    "deepspeed.zero_optimization": "zero",
    "deepspeed.zero_optimization.stage": "zero_stage",
    "deepspeed.zero_optimization.offload_optimizer": "cpu_offload offload",
    "deepspeed.zero_optimization.overlap_comm": "overlap_grad_reduce",
    "logging": "metrics",
    "training": ".train trainer train_args training_args training_arguments hyperparameters",
    "schedule": "scheduler lr_scheduler",
    "deepspeed": "ds_config deepspeed_config",
}

# Remedies for names that have no key of the same meaning.
_OTHERWISE = {
    'set training.precision to "bf16"': "bf16 use_bf16 bfloat16",
    'set training.precision to "fp16"': "fp16 use_fp16 half",
    'set training.activation_checkpointing to "selective" or "full"': "gradient_checkpointing "
    "recompute_granularity recompute_activations use_checkpoint activation_checkpoint recompute "
    "use_gradient_checkpointing checkpoint_activations",
    "training.global_batch_size, training.micro_batch_size and the number of ranks determine it; "
    "set training.global_batch_size": "gradient_accumulation_steps grad_accum "
    "gradient_accumulation accumulate_grad_batches grad_accum_steps",
    "set training.global_batch_size (samples per step, over all ranks) and "
    "training.micro_batch_size (samples per forward pass of a rank)": "batch_size bs batch",
    "set schedule.warmup_steps to this ratio times training.steps": "warmup_ratio "
    "warmup_fraction lr_warmup_fraction warmup_proportion",
    "set schedule.min_lr_ratio to the final learning rate / optimizer.lr": "min_lr lr_min final_lr "
    "min_learning_rate end_lr lr_end",
    "set training.steps, or finetune.epochs when fine-tuning": "num_train_epochs num_epochs "
    "max_epochs n_epochs train_epochs",
    "set training.steps to samples / training.global_batch_size": "train_samples max_samples "
    "num_train_samples",
    "set data.sequence_length, or finetune.data.max_length when fine-tuning": "max_length max_len "
    "context_size context_window cutoff_len model_max_length",
    "set model.hidden_dropout and model.attention_dropout": "dropout",
    "set model.attention_bias and model.mlp_bias": "bias use_bias add_bias_linear",
    "set model.attention_bias and model.mlp_bias to false": "disable_bias_linear",
    "set model.tie_word_embeddings to false": "untie_embeddings_and_output_weights",
    "set model.num_key_value_heads (fewer than model.num_attention_heads)": "group_query_attention",
    "set model.num_key_value_heads to 1": "multi_query",
    'set model.position_embedding to "rope"': "use_rotary_position_embeddings",
    "set model.rope_theta and model.rope_scaling": "rope_parameters",
    "RoPE always rotates whole heads; remove it": "rotary_pct rotary_percent rotary_percentage "
    "partial_rotary_factor",
    "mixtures of experts are not supported; remove it": "num_experts num_local_experts "
    "num_experts_per_tok n_routed_experts moe_router_topk",
    "set the sizes in the model section, or extend a shipped run file": "flavor model_size "
    "model.name",
    "the attention kernel is chosen automatically; remove it": "attn_implementation "
    "_attn_implementation use_flash_attn use_flash_attention_2 flash_attention attention_backend",
    "the head is always fused with the loss; remove it": "cross_entropy_loss_fusion "
    "use_liger_kernel",
    "set schedule.decay_steps to this number minus schedule.warmup_steps": "lr_decay_iters "
    "decay_iters lr_decay_steps",
    "set schedule.decay_steps to this ratio times training.steps": "decay_ratio",
    'set schedule.name to "constant" for a constant rate': "decay_lr",
    "set training.global_batch_size, which is constant over a run": "rampup_batch_size",
    "set training.profile to the first and the last step of a trace": "enable_profiling "
    "profile_freq profile_step_start profile_step_end",
    "set data.train and data.valid to two folders of shards": ".split data.split",
    "set finetune.adapter.targets to the projections that have an adapter": "lora_query lora_key "
    "lora_value lora_projection lora_mlp",
    "only plain LoRA is supported; remove it": "use_dora use_rslora init_lora_weights "
    "modules_to_save",
    "quantized models are not supported; remove it": "load_in_4bit load_in_8bit quantization "
    "quantization_config",
    "a run with the same name is resumed; set name for another run": "overwrite_output_dir",
    "every checkpoint is safetensors and can be resumed; remove it": "save_safetensors ckpt_format "
    "save_only_model last_save_model_only no_save_optim",
    "SIGTERM saves and stops the run; let the scheduler send it in time": "max_time "
    "exit_duration_in_mins exit_interval",
    "validation always runs at the start and at the end; remove it": "initial_validation "
    "final_validation eval_on_start",
    "set training.seed (weights, dropout) or data.seed (order)": "seed",
    "set logging.tensorboard or logging.wandb": "report_to log_with logger",
    "set training.eval_every and training.eval_batches": "eval evaluation validation",
    "set training.eval_every": "eval_strategy evaluation_strategy do_eval",
    "set checkpoint.every": "save_strategy always_save_checkpoint",
    "set training.micro_batch_size, which evaluation uses too": "per_device_eval_batch_size "
    "eval_batch_size per_gpu_eval_batch_size val_batch_size",
    "use the option --init-from": "model_name_or_path pretrained_model model_name init_from "
    "base_model pretrained_model_name_or_path finetune_from from_pretrained initial_checkpoint_dir",
    "use the option --resume": "resume_from_checkpoint resume load_checkpoint load resume_from "
    "ckpt_path load_path",
    "start that many ranks with torchrun, deepspeed, srun or mpirun": "devices num_gpus world_size "
    "data_parallel_shard_degree data_parallel_replicate_degree "
    "nproc_per_node num_nodes nnodes n_gpus gpus num_processes dp data_parallel_size parallel.data",
    "pipeline, context and expert parallelism are not supported; set parallel.tensor and the ZeRO "
    "stage": "pipeline_model_parallel_size pipeline_parallel_size pp pp_size context_parallel_size "
    "cp expert_model_parallel_size expert_parallel_size pipeline_parallel context_parallel "
    "parallel.pipeline parallel.context parallel.expert pipeline_parallel_degree "
    "context_parallel_degree expert_parallel_degree",
    "set deepspeed.zero_optimization.stage": "use_distributed_optimizer fsdp fsdp_config strategy",
    'set model.activation to "swiglu"': "swiglu use_swiglu",
    "the tokenizer of the data defines it; remove it": "bos_token_id eos_token_id pad_token_id "
    "unk_token_id tokenizer_type",
    "shards contain token ids; remove it, and give the tokenizer to python -m data_prep tokenize "
    "--tokenizer": "tokenizer vocab_file merge_file",
    "the data loader has no such option; remove it": "dataloader_num_workers num_workers "
    "dataloader_drop_last dataloader_pin_memory drop_last pin_memory shuffle",
}

_ANSWERS = {
    **{name: f'its name here is "{key}"' for key, names in _SAME.items() for name in names.split()},
    **{name: remedy for remedy, names in _OTHERWISE.items() for name in names.split()},
}


def foreign_answer(name: str, section: str = "") -> str:
    """Return the answer to a key name of another trainer. "" means that the name is unknown.

    `--max-steps` and `max_step` are read as `max_steps`.
    """
    name = name.strip().lstrip("-").replace("-", "_").lower()
    forms = (f"{section}.{name}", name, f"{name}s", name.removesuffix("s"))
    return next((_ANSWERS[form] for form in forms if form in _ANSWERS), "")
