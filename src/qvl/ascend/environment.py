"""Known environment variables of Ascend, CUDA and qvl, and the detection of misspelt ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

KNOWN: Final = frozenset(
    """
    ASCEND_RT_VISIBLE_DEVICES ASCEND_VISIBLE_DEVICES ASCEND_DEVICE_ID ASCEND_HOME_PATH ASCEND_TOOLKIT_HOME
    ASCEND_AICPU_PATH ASCEND_OPP_PATH ASCEND_CUSTOM_OPP_PATH ASCEND_LAUNCH_BLOCKING ASCEND_PROCESS_LOG_PATH
    ASCEND_GLOBAL_LOG_LEVEL ASCEND_GLOBAL_EVENT_ENABLE ASCEND_SLOG_PRINT_TO_STDOUT ASCEND_WORK_PATH
    ASCEND_CACHE_PATH ASCEND_AUTOML_PATH ASCEND_RUNTIME_OPTIONS ASCEND_DRIVER_PATH ASCEND_LOG_DEVICE_FLUSH_TIMEOUT
    ASCEND_MODULE_LOG_LEVEL ASCEND_HOST_LOG_FILE_NUM
    TASK_QUEUE_ENABLE CPU_AFFINITY_CONF COMBINED_ENABLE ACL_OP_COMPILER_CACHE_DIR ACL_OP_COMPILER_CACHE_MODE
    ACL_OP_INIT_MODE ACL_DEVICE_SYNC_TIMEOUT
    PYTORCH_NPU_ALLOC_CONF PYTORCH_ALLOC_CONF PYTORCH_CUDA_ALLOC_CONF TORCH_NPU_FALLBACK_CPU_DISABLE TORCH_NPU_LOGS
    TORCH_DEVICE_BACKEND_AUTOLOAD INF_NAN_MODE_ENABLE MULTI_STREAM_MEMORY_REUSE
    HCCL_OP_EXPANSION_MODE HCCL_IF_IP HCCL_IF_BASE_PORT HCCL_SOCKET_IFNAME HCCL_SOCKET_FAMILY HCCL_BUFFSIZE
    HCCL_NPU_SOCKET_PORT_RANGE HCCL_HOST_SOCKET_PORT_RANGE HCCL_CONNECT_TIMEOUT HCCL_EXEC_TIMEOUT HCCL_DETERMINISTIC
    HCCL_WHITELIST_DISABLE HCCL_INTRA_PCIE_ENABLE HCCL_INTRA_ROCE_ENABLE HCCL_RDMA_TC HCCL_RDMA_SL HCCL_ALGO
    GLOO_SOCKET_IFNAME TP_SOCKET_IFNAME OMP_NUM_THREADS OMP_PROC_BIND
    LCCL_DETERMINISTIC ATB_MATMUL_SHUFFLE_K_ENABLE ATB_LLM_LCOC_ENABLE ATB_HOME_PATH ATB_WORKSPACE_MEM_ALLOC_ALG_TYPE
    VLLM_API_KEY VLLM_USE_MODELSCOPE VLLM_WORKER_MULTIPROC_METHOD VLLM_ASCEND_ENABLE_NZ VLLM_IMAGE_FETCH_TIMEOUT
    VLLM_MAX_IMAGE_PIXELS
    CUDA_VISIBLE_DEVICES CUDA_DEVICE_ORDER CUDA_LAUNCH_BLOCKING
    HF_HUB_OFFLINE HF_ENDPOINT HF_HOME HF_TOKEN HF_HUB_CACHE HF_HUB_DISABLE_PROGRESS_BARS TRANSFORMERS_OFFLINE
    OPENAI_API_KEY OPENAI_BASE_URL
    QVL_CONFIG QVL_LANGUAGE QVL_CONCURRENCY QVL_CACHE_MODE QVL_CACHE_TTL QVL_NAMESPACE QVL_LOG_LEVEL
    QVL_MAX_PIXELS QVL_MIN_PIXELS
    QVL_MODEL QVL_SERVED_MODEL_NAME QVL_ANY_MODEL_NAME
    QVL_DEVICE QVL_DTYPE QVL_MAX_MODEL_LEN QVL_MAX_NUM_SEQS QVL_QUANTIZE QVL_DECODE_KERNEL QVL_GOAL QVL_MAX_STEP_MS
    QVL_BASE_URL
    QVL_UPSTREAM_KEY QVL_CANARY QVL_EXIT_ON_ENGINE_DEATH QVL_HOST QVL_PORT QVL_ROOT_PATH QVL_TLS_CERT QVL_TLS_KEY
    QVL_CACHE QVL_API_KEY QVL_API_KEY_FILE QVL_ALLOW_UNAUTHENTICATED QVL_CORS_ORIGIN QVL_MAX_CONCURRENT QVL_MAX_QUEUE
    QVL_MAX_QUEUE_PICTURE_TOKENS QVL_REQUESTS_PER_MINUTE QVL_CONCURRENT_PER_KEY QVL_REQUEST_TIMEOUT QVL_DRAIN_TIMEOUT
    QVL_STALL_TIMEOUT QVL_BODY_TIMEOUT QVL_HEADER_TIMEOUT QVL_MEDIA_TIMEOUT QVL_MAX_BODY_MB QVL_LOG_FORMAT
    QVL_MAX_DECODE_MB QVL_MAX_DECODED_MB QVL_ALLOWED_MEDIA_DOMAINS QVL_ALLOWED_PRIVATE
    QVL_OTLP_TRACES_ENDPOINT QVL_BASE_URL_FILE QVL_REPLICAS QVL_DEVICES QVL_RAY_ADDRESS
    QVL_BATCH_CONCURRENCY QVL_BATCH_DIR QVL_BATCH_DISK_MB QVL_LIMIT_MM_PER_PROMPT QVL_MAX_BATCH_FILE_MB
    QVL_RESPONSE_TTL QVL_WORKERS QVL_CALIBRATION QVL_ABSTAIN QVL_LORA
    """.split()  # noqa: SIM905 - one word list is easier to keep than a hundred quoted lines
)
_PREFIXES: Final = (
    "ASCEND", "HCCL", "LCCL", "PYTORCH_", "TORCH_", "TASK_QUEUE", "ACL_", "QVL", "VLLM_", "HF_", "OMP_", "CUDA_",
    "OPENAI_",
)  # fmt: skip
_NEAR = 2
_SHORTEST = 8


def misspelt(environ: Mapping[str, str], extra_known: Iterable[str] = ()) -> dict[str, str]:
    """Return unknown variables of `environ` that are close to a known one, mapped to that name.

    Close means an edit distance of at most 2, or the same words in another order. Other unknown variables belong to
    other programs and are ignored.
    """
    known = KNOWN | set(extra_known)
    corrections: dict[str, str] = {}
    for name in sorted(environ):
        upper = name.upper()
        if name in known or not upper.startswith(_PREFIXES) or len(name) < _SHORTEST:
            continue
        meant = min(known, key=lambda candidate: (distance(upper, candidate), candidate))
        words = sorted(upper.split("_"))
        swapped = next((candidate for candidate in sorted(known) if sorted(candidate.split("_")) == words), None)
        if swapped:
            corrections[name] = swapped
        elif upper == meant or (distance(upper, meant) <= _NEAR and _letters(upper) != _letters(meant)):
            corrections[name] = meant
    return corrections


def distance(a: str, b: str) -> int:
    """Return the edit distance of two strings, with swaps of neighbours (optimal string alignment)."""
    if abs(len(a) - len(b)) > _NEAR:
        return _NEAR + 1
    before: list[int] = []
    last = list(range(len(b) + 1))
    for i, left in enumerate(a, 1):
        row = [i]
        for j, right in enumerate(b, 1):
            cost = min(last[j] + 1, row[j - 1] + 1, last[j - 1] + (left != right))
            if i > 1 and j > 1 and left == b[j - 2] and a[i - 2] == right:
                cost = min(cost, before[j - 2] + 1)
            row.append(cost)
        before, last = last, row
    return last[-1]


def _letters(name: str) -> str:
    # VLLM_USE_V2 beside VLLM_USE_V1 is another variable, not a misspelt one.
    return "".join(letter for letter in name if not letter.isdigit())
