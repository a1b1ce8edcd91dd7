/* bitnet-burn's engine: opens BitNet models and generates text with them.
 *
 * Link with libbitnet.so, or with libbitnet.a and the system's libraries (Linux: -lm -lpthread -ldl). README.md beside this
 * folder has an example.
 *
 * - Texts are UTF-8. Those that the caller passes end with a zero byte. They are copied where they are kept.
 * - Functions that can fail return a status. `bitnet_error` has the message of the last failure in the calling thread.
 * - No function panics or unwinds into the caller. In a signal handler, only `bitnet_session_cancel` may be called.
 * - An engine can be used by any number of threads at once. One thread at a time generates with a session; others get
 *   BITNET_BUSY.
 * - Structures begin with `size`, their size in the caller's program: `bitnet_generate_options o = {.size = sizeof o};`.
 *   A field that is zero has its default. Later versions append fields, and read no field behind `size`.
 * - The environment variables BITNET_* have the same meaning as for the program `bitnet`.
 */
#ifndef BITNET_H
#define BITNET_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef enum bitnet_status {
    BITNET_OK = 0,
    /* An argument is wrong: a null pointer, a text that is not UTF-8, a value out of range. */
    BITNET_INVALID = 1,
    /* The model, its files, its tokenizer or a kernel failed. */
    BITNET_FAILED = 2,
    /* Another call uses the session. */
    BITNET_BUSY = 3,
    /* The buffer is too short. The needed length was written. */
    BITNET_TOO_SHORT = 4,
    /* A fault of this library. The session that it happened in is unusable. */
    BITNET_INTERNAL = 5
} bitnet_status;

/* A model that is ready. */
typedef struct bitnet_engine bitnet_engine;
/* A conversation, or any other sequence of prompts. It has a KV cache of its own. */
typedef struct bitnet_session bitnet_session;

typedef enum bitnet_kv_cache { BITNET_KV_F32 = 0, BITNET_KV_F16 = 1, BITNET_KV_INT8 = 2 } bitnet_kv_cache;

/* How the output projection is computed: as the file has it, or in a form with int8 activations, which is faster and an
 * approximation. */
typedef enum bitnet_lm_head {
    BITNET_HEAD_FILE = 0,
    BITNET_HEAD_INT8 = 1,
    BITNET_HEAD_Q8_0 = 2,
    BITNET_HEAD_Q6_K = 3,
    BITNET_HEAD_Q4_0 = 4
} bitnet_lm_head;

typedef struct bitnet_open_options {
    size_t size;
    /* Threads of the kernels, for the whole process: the first engine decides. 0: one for each physical core. */
    uint32_t threads;
    /* Positions of a session's KV cache. 0: as many as the model was trained for. */
    uint32_t context;
    bitnet_kv_cache kv_cache;
    bitnet_lm_head lm_head;
    /* Where the model computes: "cpu", "auto", or a name of another device. NULL: "cpu". */
    const char *device;
} bitnet_open_options;

typedef struct bitnet_generate_options {
    size_t size;
    /* Tokens to generate at most. 0: 128. */
    uint32_t max_new_tokens;
    /* 0: always the most likely token. */
    float temperature;
    /* Only the k most likely tokens. 0: off. */
    uint32_t top_k;
    /* Only the most likely tokens with this probability in all. 0 and 1: off. */
    float top_p;
    /* Only tokens with this part of the most likely one's probability. 0: off. */
    float min_p;
    /* Divides positive and multiplies negative logits of tokens that occurred. 0 and 1: off. */
    float repetition_penalty;
    uint64_t seed;
    /* Texts that end the answer. They are not part of it. */
    const char *const *stop;
    size_t stop_count;
    /* The answer is JSON that is valid by this schema. NULL: any text. */
    const char *json_schema;
} bitnet_generate_options;

typedef enum bitnet_finish {
    /* It has `max_new_tokens` tokens. */
    BITNET_FINISH_LENGTH = 0,
    /* The model ended it. */
    BITNET_FINISH_STOP_TOKEN = 1,
    /* A stop text ended it. */
    BITNET_FINISH_STOP_STRING = 2,
    /* The JSON is complete. */
    BITNET_FINISH_CONSTRAINT = 3,
    /* The context is full. */
    BITNET_FINISH_CONTEXT = 4,
    /* `on_text` or `bitnet_session_cancel` ended it. */
    BITNET_FINISH_CANCELLED = 5
} bitnet_finish;

/* What became of a generation. `size` is the caller's, like that of options. */
typedef struct bitnet_result {
    size_t size;
    bitnet_finish finish;
    uint32_t prompt_tokens;
    /* Tokens of the prompt that the session's KV cache had already. */
    uint32_t cached_tokens;
    uint32_t generated_tokens;
    double prefill_seconds;
    double decode_seconds;
} bitnet_result;

/* Gets a piece of the answer: `length` bytes of UTF-8, and a zero byte behind them. False ends the answer. */
typedef bool (*bitnet_on_text)(const char *text, size_t length, void *user);

/* The version of this library, such as "0.1.0". */
const char *bitnet_version(void);

/* The message of the last failure in this thread: empty before the first one, and valid until the next one. */
const char *bitnet_error(void);

/* Opens a GGUF file or a Hugging Face directory. `path` NULL: the model that this library carries. `options` NULL: the
 * defaults. */
bitnet_status bitnet_open(const char *path, const bitnet_open_options *options, bitnet_engine **engine);

/* Frees an engine. Its sessions stay usable. NULL is ignored. */
void bitnet_engine_free(bitnet_engine *engine);

/* The tokens of a text. `count` gets their number, also if `capacity` is less (BITNET_TOO_SHORT; nothing is written to
 * `tokens` then). `special`: with those that a prompt begins and ends with. */
bitnet_status bitnet_tokenize(const bitnet_engine *engine, const char *text, bool special, uint32_t *tokens,
                              size_t capacity, size_t *count);

/* The text of tokens, without special ones, and a zero byte. `length` gets its length without that byte, also if
 * `capacity` is too short (BITNET_TOO_SHORT; nothing is written to `text` then). */
bitnet_status bitnet_detokenize(const bitnet_engine *engine, const uint32_t *tokens, size_t count, char *text,
                                size_t capacity, size_t *length);

bitnet_status bitnet_session_new(const bitnet_engine *engine, bitnet_session **session);

/* Frees a session. No thread may be generating with it. NULL is ignored. */
void bitnet_session_free(bitnet_session *session);

/* Generates text behind a prompt. What the prompt has in common with the last one and its answer is not computed again.
 * Without `options` the defaults hold. `on_text` and `result` may be NULL, too. */
bitnet_status bitnet_generate(bitnet_session *session, const char *prompt, const bitnet_generate_options *options,
                              bitnet_on_text on_text, void *user, bitnet_result *result);

/* Answers a message of the user, by the model's chat template, behind the messages so far. Message and answer are kept,
 * unless this fails. */
bitnet_status bitnet_chat(bitnet_session *session, const char *message, const bitnet_generate_options *options,
                          bitnet_on_text on_text, void *user, bitnet_result *result);

/* Adds a message that the next answer follows. `role` is "system", "assistant" or another one of the template's. */
bitnet_status bitnet_session_push(bitnet_session *session, const char *role, const char *content);

/* Forgets all messages. */
bitnet_status bitnet_session_reset(bitnet_session *session);

/* Ends the answer that another thread generates now, before its next forward pass. Without one it does nothing. */
void bitnet_session_cancel(bitnet_session *session);

#ifdef __cplusplus
}
#endif

#endif
