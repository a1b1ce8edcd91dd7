/* Calls every function of bitnet.h, and checks what it promises. Without arguments it uses the model that the library
 * carries; else one with a chat template, whose path is the argument. Prints the answer. */
#include "bitnet.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define CHECK(condition)                                                                            \
    do {                                                                                            \
        if (!(condition)) {                                                                         \
            fprintf(stderr, "line %d: %s; last error: %s\n", __LINE__, #condition, bitnet_error()); \
            exit(1);                                                                                \
        }                                                                                           \
    } while (0)

struct answer {
    char text[4096];
    size_t length;
    size_t pieces;
    size_t most;
    /* Calls for each piece: one that must wait for the session, or the one that need not. */
    bitnet_session *session;
    bool cancels;
    bitnet_status nested;
};

static bool hear(const char *text, size_t length, void *user) {
    struct answer *answer = user;
    CHECK(strlen(text) == length && answer->length + length < sizeof answer->text);
    memcpy(answer->text + answer->length, text, length + 1);
    answer->length += length;
    answer->pieces++;
    if (answer->cancels)
        bitnet_session_cancel(answer->session);
    else if (answer->session)
        answer->nested = bitnet_session_reset(answer->session);
    return !answer->most || answer->pieces < answer->most;
}

static void generates(bitnet_engine *engine) {
    bitnet_session *session;
    CHECK(bitnet_session_new(engine, &session) == BITNET_OK);
    bitnet_generate_options options = {.size = sizeof options, .max_new_tokens = 24};
    bitnet_result result = {.size = sizeof result};
    struct answer first = {0}, second = {0}, cut = {.most = 2}, busy = {.session = session},
                  cancelled = {.session = session, .cancels = true};
    CHECK(bitnet_generate(session, "There was", &options, hear, &first, &result) == BITNET_OK);
    CHECK(first.length > 0 && result.generated_tokens > 0 && result.prompt_tokens > 0);
    CHECK(result.cached_tokens == 0 && result.prefill_seconds > 0);
    puts(first.text);
    /* The same, over what the cache has. */
    CHECK(bitnet_generate(session, "There was", &options, hear, &second, &result) == BITNET_OK);
    CHECK(strcmp(first.text, second.text) == 0 && result.cached_tokens == result.prompt_tokens - 1);
    /* Cut by the function, and by a stop text. */
    CHECK(bitnet_generate(session, "There was", &options, hear, &cut, &result) == BITNET_OK);
    CHECK(result.finish == BITNET_FINISH_CANCELLED && strncmp(first.text, cut.text, cut.length) == 0);
    const char *stop[] = {"a"};
    struct answer stopped = {0};
    options.stop = stop;
    options.stop_count = 1;
    CHECK(bitnet_generate(session, "There was", &options, hear, &stopped, &result) == BITNET_OK);
    CHECK(result.finish == BITNET_FINISH_STOP_STRING && !strchr(stopped.text, 'a'));
    options.stop_count = 0;
    CHECK(bitnet_generate(session, "There was", &options, hear, &busy, NULL) == BITNET_OK);
    CHECK(busy.nested == BITNET_BUSY);
    CHECK(bitnet_generate(session, "There was", &options, hear, &cancelled, &result) == BITNET_OK);
    CHECK(result.finish == BITNET_FINISH_CANCELLED && cancelled.pieces < first.pieces);
    /* JSON of a schema. */
    struct answer json = {0};
    options.max_new_tokens = 64;
    options.json_schema = "{\"type\": \"boolean\"}";
    CHECK(bitnet_generate(session, "There was", &options, hear, &json, &result) == BITNET_OK);
    CHECK(strcmp(json.text, "true") == 0 || strcmp(json.text, "false") == 0);
    /* A structure of an older program ends before the fields that it does not have. */
    bitnet_generate_options old = {.size = offsetof(bitnet_generate_options, temperature), .max_new_tokens = 3,
                                   .temperature = -1.0f};
    CHECK(bitnet_generate(session, "There was", &old, NULL, NULL, &result) == BITNET_OK);
    CHECK(result.generated_tokens == 3);
    bitnet_session_free(session);
}

static void says_what_is_wrong(bitnet_engine *engine) {
    bitnet_engine *none = engine;
    CHECK(bitnet_open("/does/not/exist.gguf", NULL, &none) == BITNET_FAILED && !none);
    CHECK(strstr(bitnet_error(), "/does/not/exist.gguf"));
    CHECK(bitnet_open("not UTF-8: \xff", NULL, &none) == BITNET_INVALID && strstr(bitnet_error(), "byte 11"));
    bitnet_open_options unset = {0};
    CHECK(bitnet_open(NULL, &unset, &none) == BITNET_INVALID && strstr(bitnet_error(), "size"));
    bitnet_open_options more = {.size = sizeof more, .threads = 63};
    CHECK(bitnet_open(NULL, &more, &none) == BITNET_INVALID && strstr(bitnet_error(), "threads"));
    bitnet_open_options device = {.size = sizeof device, .device = "abacus"};
    CHECK(bitnet_open(NULL, &device, &none) == BITNET_FAILED && strstr(bitnet_error(), "abacus"));
    CHECK(bitnet_open(NULL, NULL, NULL) == BITNET_INVALID && strstr(bitnet_error(), "engine"));
    struct {
        bitnet_generate_options options;
        uint64_t later;
    } newer = {.options.size = sizeof newer, .later = 0};
    bitnet_session *session;
    CHECK(bitnet_session_new(engine, &session) == BITNET_OK);
    newer.options.max_new_tokens = 1;
    CHECK(bitnet_generate(session, "There", &newer.options, NULL, NULL, NULL) == BITNET_OK);
    newer.later = 1;
    CHECK(bitnet_generate(session, "There", &newer.options, NULL, NULL, NULL) == BITNET_INVALID);
    bitnet_generate_options cold = {.size = sizeof cold, .temperature = -1.0f};
    CHECK(bitnet_generate(session, "There", &cold, NULL, NULL, NULL) == BITNET_INVALID);
    CHECK(strstr(bitnet_error(), "temperature"));
    CHECK(bitnet_generate(session, NULL, NULL, NULL, NULL, NULL) == BITNET_INVALID && strstr(bitnet_error(), "prompt"));
    CHECK(bitnet_generate(NULL, "There", NULL, NULL, NULL, NULL) == BITNET_INVALID);
    bitnet_session_cancel(NULL);
    bitnet_session_free(NULL);
    bitnet_engine_free(NULL);
    bitnet_session_free(session);
}

static void tokenises(bitnet_engine *engine) {
    uint32_t tokens[64];
    size_t count, length;
    char text[64];
    CHECK(bitnet_tokenize(engine, "There was", false, NULL, 0, &count) == BITNET_TOO_SHORT && count > 0);
    CHECK(bitnet_tokenize(engine, "There was", false, tokens, 64, &count) == BITNET_OK);
    CHECK(bitnet_detokenize(engine, tokens, count, text, sizeof text, &length) == BITNET_OK);
    CHECK(strcmp(text, "There was") == 0 && length == strlen(text));
    CHECK(bitnet_detokenize(engine, tokens, count, text, length, &length) == BITNET_TOO_SHORT);
    CHECK(bitnet_detokenize(engine, NULL, 0, text, sizeof text, &length) == BITNET_OK && length == 0);
}

static void chats(bitnet_engine *engine, bool template) {
    bitnet_session *session;
    CHECK(bitnet_session_new(engine, &session) == BITNET_OK);
    bitnet_generate_options options = {.size = sizeof options, .max_new_tokens = 6};
    bitnet_result first = {.size = sizeof first}, second = first;
    if (!template) {
        CHECK(bitnet_chat(session, "Hello", &options, NULL, NULL, NULL) == BITNET_FAILED);
        CHECK(strstr(bitnet_error(), "template"));
    } else {
        CHECK(bitnet_session_push(session, "system", "Be brief.") == BITNET_OK);
        CHECK(bitnet_chat(session, "Hello", &options, NULL, NULL, &first) == BITNET_OK);
        CHECK(bitnet_chat(session, "And now?", &options, NULL, NULL, &second) == BITNET_OK);
        CHECK(second.prompt_tokens > first.prompt_tokens + first.generated_tokens && second.cached_tokens > 0);
        CHECK(bitnet_session_reset(session) == BITNET_OK);
        CHECK(bitnet_chat(session, "Hello", &options, NULL, NULL, &second) == BITNET_OK);
        CHECK(second.prompt_tokens < first.prompt_tokens);
    }
    bitnet_session_free(session);
}

int main(int argc, char **argv) {
    bitnet_engine *engine;
    bitnet_open_options options = {.size = sizeof options, .threads = 2, .context = 256};
    CHECK(strlen(bitnet_error()) == 0 && strlen(bitnet_version()) > 0);
    CHECK(bitnet_open(argc > 1 ? argv[1] : NULL, &options, &engine) == BITNET_OK);
    if (argc == 1) {
        tokenises(engine);
        generates(engine);
    }
    chats(engine, argc > 1);
    says_what_is_wrong(engine);
    /* A session outlives its engine. */
    bitnet_session *session;
    CHECK(bitnet_session_new(engine, &session) == BITNET_OK);
    bitnet_engine_free(engine);
    bitnet_generate_options few = {.size = sizeof few, .max_new_tokens = 2};
    CHECK(bitnet_generate(session, "There was", &few, NULL, NULL, NULL) == BITNET_OK);
    bitnet_session_free(session);
    return 0;
}
