/* The load client of bench/stream_beside_peer.py: one epoll loop, every answer checked. Same manners as `baton bench stream`, in C, because
 * at 1,024 connections a client in Python costs more CPU per token than the servers it measures. Linux, HTTP/1.1 without TLS.
 *
 *   stream_client HOST PORT CONNECTIONS SECONDS OPEN_PER_S REQUESTS ANSWER_LIMIT_S CHECK_EVERY FIRST PROMPTS-FILE
 *
 * SECONDS: no request is started later. OPEN_PER_S: connections opened per second, 0: at once. REQUESTS: in all, 0: no limit.
 * CHECK_EVERY: each so-manieth request is a prompt with a known answer, the text of which must be equal; FIRST: the first of those to use.
 * PROMPTS-FILE: for each prompt five little-endian u32 (length of the request, length of its answer or 0xFFFFFFFF, where in the request
 * the stamp of 16 letters is or 0, tokens, 0), the request with its HTTP head, the answer. Prompts with a stamp get another one for each
 * request, so that no server has seen them before.
 *
 * While an answer comes in, only its bytes and the time of each read are kept; it is read when it is complete. Prints one JSON object;
 * histograms are {bucket: count}, bucket = round(100 ln(seconds / 1 us)), as in baton_cli/bench/figures.py. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <math.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define UNKNOWN 0xFFFFFFFFu
#define STAMP_CHARS 16
#define READ_BYTES 65536
#define PAUSE_S 0.2 /* before a connection that failed, or was refused, is used again */
#define NUM_BUCKETS 4096
#define NUM_BINS 4096
#define BIN_S 0.1

typedef struct { char *request, *text; uint32_t request_len, text_len, stamp_at, tokens; } Prompt;
typedef struct { long buckets[NUM_BUCKETS]; double largest; } Durations;
typedef struct { size_t raw_end; double at; } Read;
typedef struct {
  int fd, is_reused, is_open, is_busy, is_chunked, keeps_alive, status;
  const Prompt *prompt;
  char *out;
  size_t out_len, out_at;
  char *raw;
  size_t raw_len, raw_size, body_at;
  long length; /* of the body, -1: not said */
  Read *reads;
  size_t num_reads, reads_size;
  double sent_at, not_before;
} Stream;
typedef struct { char name[40]; long count; } End;

static Prompt *checked, *stamped;
static size_t num_checked, num_stamped, next_checked, next_stamped;
static Durations first_s, gap_s, total_s, refused_s, per_token_s;
static End ends[64];
static int num_ends;
static char problems[10][240];
static int num_problems;
static long started, num_ended, tokens, events, same_read, num_bytes, reconnects, without_usage, without_retry_after, texts_checked, most_open, now_open;
static long bins[NUM_BINS];
static double began, duration_s, answer_limit_s;
static long max_requests, check_every;
static uint64_t stamp;
static int epoll_fd;
static struct sockaddr_in server;
static char *scratch;
static size_t scratch_size;

static double now_s(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + t.tv_nsec * 1e-9;
}

static void add(Durations *d, double s) {
  long bucket = lround(log((s < 1e-6 ? 1e-6 : s) / 1e-6) * 100);
  d->buckets[bucket < NUM_BUCKETS ? bucket : NUM_BUCKETS - 1]++;
  if (s > d->largest) d->largest = s;
}

static void *grown(void *p, size_t *size, size_t needed, size_t unit) {
  if (needed <= *size) return p;
  *size = needed * 2;
  p = realloc(p, *size * unit);
  if (!p) { perror("realloc"); exit(2); }
  return p;
}

static void note(const char *format, ...) {
  if (num_problems >= 10) return;
  va_list args;
  va_start(args, format);
  vsnprintf(problems[num_problems++], sizeof problems[0], format, args);
  va_end(args);
}

static void count_end(const char *name) {
  num_ended++;
  for (int i = 0; i < num_ends; i++)
    if (!strcmp(ends[i].name, name)) { ends[i].count++; return; }
  if (num_ends == 64) { ends[63].count++; return; }
  snprintf(ends[num_ends].name, sizeof ends[0].name, "%s", name);
  ends[num_ends++].count = 1;
}

/* JSON, as much of it as is needed. A quote inside a string is escaped, so "key": is found nowhere but where it is a key. */

static const char *value_of(const char *from, const char *end, const char *key, size_t key_len) {
  const char *at = memmem(from, end - from, key, key_len);
  if (!at) return NULL;
  at += key_len;
  while (at < end && *at == ' ') at++;
  return at < end ? at : NULL;
}
#define VALUE_OF(from, end, key) value_of(from, end, "\"" key "\":", sizeof key + 2)

static int hex4(const char *at) {
  int value = 0;
  for (int i = 0; i < 4; i++) {
    char c = at[i];
    value = value * 16 + (c <= '9' ? c - '0' : (c | 32) - 'a' + 10);
  }
  return value;
}

/* Appends the string that begins at `at` (behind its quote) to *to. Returns its bytes, or -1 if it does not end. */
static long take_string(const char *at, const char *end, char **to) {
  char *out = *to;
  while (at < end && *at != '"') {
    if (*at != '\\') { *out++ = *at++; continue; }
    if (at + 1 >= end) return -1;
    char c = at[1];
    at += 2;
    if (c != 'u') { *out++ = c == 'n' ? '\n' : c == 't' ? '\t' : c == 'r' ? '\r' : c == 'b' ? '\b' : c == 'f' ? '\f' : c; continue; }
    if (at + 4 > end) return -1;
    uint32_t point = hex4(at);
    at += 4;
    if (point >= 0xD800 && point < 0xDC00 && at + 6 <= end && at[0] == '\\' && at[1] == 'u') {
      point = 0x10000 + ((point - 0xD800) << 10) + (hex4(at + 2) - 0xDC00);
      at += 6;
    }
    if (point < 0x80) *out++ = point;
    else if (point < 0x800) { *out++ = 0xC0 | point >> 6; *out++ = 0x80 | (point & 63); }
    else if (point < 0x10000) { *out++ = 0xE0 | point >> 12; *out++ = 0x80 | (point >> 6 & 63); *out++ = 0x80 | (point & 63); }
    else { *out++ = 0xF0 | point >> 18; *out++ = 0x80 | (point >> 12 & 63); *out++ = 0x80 | (point >> 6 & 63); *out++ = 0x80 | (point & 63); }
  }
  if (at >= end) return -1;
  long length = out - *to;
  *to = out;
  return length;
}

/* What a complete answer says. */
typedef struct { int num_finishes, is_length, is_done, is_error; long completion_tokens, num_texts; double first_at, last_at; char error[40]; } Answer;

static void take_event(const char *from, const char *end, double at, char **text, Answer *answer) {
  const char *value, *place = from;
  while ((value = VALUE_OF(place, end, "content")) && *value != '"') place = value; /* null, or that of "logprobs" */
  if (value) {
    long length = take_string(value + 1, end, text);
    if (length > 0) {
      if (!answer->num_texts) answer->first_at = at;
      else { add(&gap_s, at - answer->last_at); same_read += at == answer->last_at; }
      answer->last_at = at;
      answer->num_texts++;
      long bin = (at - began) / BIN_S;
      if (bin >= 0 && bin < NUM_BINS) bins[bin]++;
    }
  }
  if ((value = VALUE_OF(from, end, "finish_reason")) && *value == '"') {
    answer->num_finishes++;
    answer->is_length = !strncmp(value, "\"length\"", 8);
  }
  if ((value = VALUE_OF(from, end, "completion_tokens")) && *value >= '0' && *value <= '9') answer->completion_tokens = atol(value);
  if ((value = VALUE_OF(from, end, "error")) && (*value == '{' || *value == '"')) {
    const char *code = VALUE_OF(value, end, "code");
    char *to = answer->error;
    answer->is_error = 1;
    if (code && *code == '"' && end - code < 38) { take_string(code + 1, end, &to); *to = 0; }
    else strcpy(answer->error, "unnamed_error");
  }
}

/* Drops the chunk headers of s->raw, in scratch; reads' ends become offsets in the body. Returns the body's length, -1: no chunks. */
static long dechunk(Stream *s, int is_chunked) {
  size_t at = s->body_at, len = 0, read = 0;
  if (!is_chunked) {
    memcpy(scratch, s->raw + at, s->raw_len - at);
    for (read = 0; read < s->num_reads; read++) s->reads[read].raw_end = s->reads[read].raw_end > at ? s->reads[read].raw_end - at : 0;
    return s->raw_len - at;
  }
  for (;;) {
    char *rest;
    size_t size = strtoul(s->raw + at, &rest, 16);
    if (rest == s->raw + at) return -1;
    char *line_end = memmem(rest, s->raw + s->raw_len - rest, "\r\n", 2);
    if (!line_end) return -1;
    size_t from = line_end + 2 - s->raw;
    for (; read < s->num_reads && s->reads[read].raw_end <= from; read++) s->reads[read].raw_end = len;
    if (!size) break;
    if (from + size > s->raw_len) return -1;
    for (; read < s->num_reads && s->reads[read].raw_end < from + size; read++) s->reads[read].raw_end = len + (s->reads[read].raw_end - from);
    memcpy(scratch + len, s->raw + from, size);
    len += size;
    at = from + size + 2;
  }
  for (; read < s->num_reads; read++) s->reads[read].raw_end = len;
  return len;
}

static const char *judge(Stream *s, double now) {
  static char name[40], *text;
  static size_t text_size;
  Answer answer = {.completion_tokens = -1};
  int is_stream = memmem(s->raw, s->body_at, "text/event-stream", 17) != NULL;
  scratch = grown(scratch, &scratch_size, s->raw_len + 1, 1);
  text = grown(text, &text_size, s->raw_len + 1, 1);
  char *text_end = text;
  long len = dechunk(s, s->is_chunked);
  if (len < 0) { note("not chunks: %.80s", s->raw + s->body_at); return "bad_response"; }
  const char *at = scratch, *end = scratch + len;
  scratch[len] = 0;
  if (is_stream) {
    size_t read = 0;
    while (at < end) {
      const char *stop = memmem(at, end - at, "\n\n", 2);
      if (!stop) break;
      if (stop - at > 5 && !memcmp(at, "data:", 5)) {
        at += at[5] == ' ' ? 6 : 5;
        while (read + 1 < s->num_reads && s->reads[read].raw_end < (size_t)(stop + 2 - scratch)) read++;
        if (stop - at == 6 && !memcmp(at, "[DONE]", 6)) answer.is_done = 1;
        else take_event(at, stop, s->reads[read].at, &text_end, &answer);
      }
      at = stop + 2;
    }
  } else {
    answer.is_done = 1;
    take_event(at, end, now, &text_end, &answer);
  }
  events += answer.num_texts;
  if (s->status == 429) {
    add(&refused_s, now - s->sent_at);
    without_retry_after += !strcasestr(s->raw, "\nretry-after:");
  }
  if (s->status != 200 || answer.is_error) {
    if (s->status != 200) snprintf(name, sizeof name, "http_%d", s->status);
    else snprintf(name, sizeof name, "%s", answer.error);
    note("%s: %.160s", name, len > 160 ? scratch + len - 160 : scratch);
    return name;
  }
  if (answer.num_texts) add(&first_s, answer.first_at - s->sent_at);
  add(&total_s, now - s->sent_at);
  long num_tokens = answer.completion_tokens >= 0 ? answer.completion_tokens : s->prompt->tokens;
  without_usage += answer.completion_tokens < 0;
  tokens += num_tokens;
  if (answer.num_texts > 1 && num_tokens > 1) add(&per_token_s, (answer.last_at - answer.first_at) / (num_tokens - 1));
  if (answer.num_finishes != 1 || !answer.is_done) { note("%d finish reasons, %s", answer.num_finishes, answer.is_done ? "an end" : "no end"); return "no_single_end"; }
  if (s->prompt->text_len != UNKNOWN) {
    texts_checked++;
    if (text_end - text != s->prompt->text_len || memcmp(text, s->prompt->text, s->prompt->text_len)) {
      long same = 0;
      while (same < text_end - text && same < s->prompt->text_len && text[same] == s->prompt->text[same]) same++;
      *text_end = 0;
      note("wrong text from byte %ld of %u (%ld came): %.40s", same, s->prompt->text_len, (long)(text_end - text), text + same);
      return "wrong_text";
    }
  }
  if (num_tokens != s->prompt->tokens || !answer.is_length) { note("%ld tokens instead of %u, %s", num_tokens, s->prompt->tokens, answer.is_length ? "length" : "not for its length"); return "wrong_length"; }
  return "complete";
}

/* Connections. */

static int is_over(double now) { return now - began >= duration_s || (max_requests && started >= max_requests); }

static void drop(Stream *s) {
  if (s->is_open) close(s->fd); /* epoll forgets it */
  s->is_open = 0;
}

static void send_more(Stream *s);

static void end_of(Stream *s, const char *name, double now) {
  count_end(name);
  s->is_busy = 0;
  now_open--;
  s->not_before = strcmp(name, "complete") ? now + PAUSE_S : 0;
}

static void send_request(Stream *s) {
  s->raw_len = s->num_reads = s->body_at = s->out_at = 0;
  s->is_reused = s->is_open;
  if (!s->is_open) {
    s->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    int one = 1;
    if (s->fd < 0) { end_of(s, "no_socket", now_s()); return; }
    setsockopt(s->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    s->is_open = 1;
    if (connect(s->fd, (struct sockaddr *)&server, sizeof server) && errno != EINPROGRESS) { drop(s); end_of(s, "cannot_connect", now_s()); return; }
    struct epoll_event event = {.events = EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET, .data.ptr = s};
    epoll_ctl(epoll_fd, EPOLL_CTL_ADD, s->fd, &event);
  } else
    send_more(s);
}

static void begin(Stream *s, double now) {
  const Prompt *p;
  if (!num_stamped || started % check_every == 0) p = &checked[next_checked++ % num_checked];
  else p = &stamped[next_stamped++ % num_stamped];
  started++;
  s->prompt = p;
  s->out = realloc(s->out, p->request_len);
  s->out_len = p->request_len;
  memcpy(s->out, p->request, p->request_len);
  if (p->stamp_at) {
    uint64_t left = stamp++ * 0x9E3779B97F4A7C15u; /* letters that look random, and all differ: the factor is odd */
    for (int i = 0; i < STAMP_CHARS; i++, left >>= 4) s->out[p->stamp_at + i] = 'a' + (left & 15);
  }
  s->sent_at = now;
  s->is_busy = 1;
  if (++now_open > most_open) most_open = now_open;
  send_request(s);
}

static void broken(Stream *s, const char *name, double now) {
  int may_send_again = s->is_reused && !s->raw_len;
  drop(s);
  if (may_send_again) { reconnects++; send_request(s); return; } /* the server had closed the idle connection, most likely */
  end_of(s, name, now);
}

static void send_more(Stream *s) {
  while (s->out_at < s->out_len) {
    ssize_t sent = send(s->fd, s->out + s->out_at, s->out_len - s->out_at, MSG_NOSIGNAL);
    if (sent < 0) {
      if (errno != EAGAIN && errno != ENOTCONN) broken(s, "broken", now_s());
      return;
    }
    s->out_at += sent;
  }
}

static int read_head(Stream *s) {
  char *end = memmem(s->raw, s->raw_len, "\r\n\r\n", 4);
  if (!end) return 0;
  if (strncmp(s->raw, "HTTP/1.1 ", 9)) return -1;
  *end = 0; /* for the searches below; put back */
  s->status = atoi(s->raw + 9);
  s->body_at = end + 4 - s->raw;
  s->is_chunked = strcasestr(s->raw, "\ntransfer-encoding: chunked") != NULL;
  char *length = strcasestr(s->raw, "\ncontent-length:");
  s->length = length ? atol(length + 16) : -1;
  s->keeps_alive = !strcasestr(s->raw, "\nconnection: close");
  *end = '\r';
  return s->is_chunked || length ? 1 : -1;
}

/* is_last: the other side has closed; no further edge will say so, so read to the end. */
static void readable(Stream *s, int is_last) {
  for (;;) {
    s->raw = grown(s->raw, &s->raw_size, s->raw_len + READ_BYTES + 1, 1);
    ssize_t got = recv(s->fd, s->raw + s->raw_len, READ_BYTES, 0);
    double now = now_s();
    if (got < 0) {
      if (errno != EAGAIN) { if (s->is_busy) broken(s, "econnreset", now); else drop(s); }
      return;
    }
    if (!s->is_busy) { drop(s); return; } /* closed, or bytes nobody asked for */
    if (!got) { broken(s, "broken", now); return; }
    num_bytes += got;
    s->raw_len += got;
    s->raw[s->raw_len] = 0;
    s->reads = grown(s->reads, &s->reads_size, s->num_reads + 1, sizeof *s->reads);
    s->reads[s->num_reads++] = (Read){s->raw_len, now};
    if (!s->body_at) {
      int found = read_head(s);
      if (found < 0) { note("not a response of HTTP/1.1 with a length: %.80s", s->raw); drop(s); end_of(s, "bad_response", now); return; }
      if (!found) continue;
    }
    size_t body = s->raw_len - s->body_at;
    const char *tail = s->raw + s->raw_len;
    int is_complete = s->is_chunked ? (body >= 5 && !memcmp(tail - 5, "0\r\n\r\n", 5) && (body == 5 || tail[-6] == '\n')) : (long)body >= s->length;
    if (is_complete) {
      const char *name = judge(s, now);
      if (!s->keeps_alive || s->out_at < s->out_len) drop(s);
      end_of(s, name, now);
      if (!s->not_before && !is_over(now)) begin(s, now);
      return; /* what comes on this connection now, comes with an event of its own */
    }
    if (got < READ_BYTES && !is_last) return; /* edge-triggered: more will be another edge */
  }
}

/* Input and output. */

static void read_prompts(const char *path) {
  FILE *file = fopen(path, "rb");
  uint32_t head[5];
  if (!file) { perror(path); exit(2); }
  while (fread(head, 4, 5, file) == 5) {
    Prompt p = {.request_len = head[0], .text_len = head[1], .stamp_at = head[2], .tokens = head[3]};
    size_t text_len = p.text_len == UNKNOWN ? 0 : p.text_len;
    p.request = malloc(p.request_len + 1);
    p.text = malloc(text_len + 1);
    if (fread(p.request, 1, p.request_len, file) != p.request_len || fread(p.text, 1, text_len, file) != text_len) { fprintf(stderr, "%s: cut short\n", path); exit(2); }
    Prompt **list = p.stamp_at ? &stamped : &checked;
    size_t *count = p.stamp_at ? &num_stamped : &num_checked;
    *list = realloc(*list, (*count + 1) * sizeof p);
    (*list)[(*count)++] = p;
  }
  fclose(file);
  if (!num_checked) { fprintf(stderr, "%s: no prompts without a stamp\n", path); exit(2); }
}

static void print_durations(const char *name, const Durations *d) {
  const char *comma = "";
  printf(", \"%s\": {\"largest_s\": %.9f, \"buckets\": {", name, d->largest);
  for (int i = 0; i < NUM_BUCKETS; i++)
    if (d->buckets[i]) { printf("%s\"%d\": %ld", comma, i, d->buckets[i]); comma = ", "; }
  printf("}}");
}

static void print_string(const char *text) {
  putchar('"');
  for (; *text; text++) {
    unsigned char c = *text;
    if (c < 32 || c == '"' || c == '\\' || c > 126) printf("\\u%04x", c);
    else putchar(c);
  }
  putchar('"');
}

static void print_report(double load_s) {
  struct rusage usage;
  getrusage(RUSAGE_SELF, &usage);
  double cpu_s = usage.ru_utime.tv_sec + usage.ru_stime.tv_sec + (usage.ru_utime.tv_usec + usage.ru_stime.tv_usec) * 1e-6;
  printf("{\"load_s\": %.6f, \"cpu_s\": %.6f, \"started\": %ld, \"tokens\": %ld, \"events\": %ld, \"same_read\": %ld, \"num_bytes\": %ld, ", load_s, cpu_s, started, tokens, events, same_read, num_bytes);
  printf("\"reconnects\": %ld, \"without_usage\": %ld, \"without_retry_after\": %ld, \"texts_checked\": %ld, \"most_open\": %ld, \"ends\": {", reconnects, without_usage, without_retry_after, texts_checked, most_open);
  for (int i = 0; i < num_ends; i++) { if (i) printf(", "); print_string(ends[i].name); printf(": %ld", ends[i].count); }
  printf("}, \"problems\": [");
  for (int i = 0; i < num_problems; i++) { if (i) printf(", "); print_string(problems[i]); }
  printf("], \"bin_s\": %g, \"events_per_bin\": [", BIN_S);
  for (long i = 0, last = load_s / BIN_S; i <= last && i < NUM_BINS; i++) printf("%s%ld", i ? ", " : "", bins[i]);
  printf("]");
  print_durations("first_s", &first_s);
  print_durations("gap_s", &gap_s);
  print_durations("total_s", &total_s);
  print_durations("refused_s", &refused_s);
  print_durations("per_token_s", &per_token_s);
  printf("}\n");
}

int main(int argc, char **argv) {
  if (argc != 11) { fprintf(stderr, "see the head of stream_client.c\n"); return 2; }
  server.sin_family = AF_INET;
  server.sin_port = htons(atoi(argv[2]));
  if (inet_pton(AF_INET, argv[1], &server.sin_addr) != 1) { fprintf(stderr, "%s: not an IPv4 address\n", argv[1]); return 2; }
  long connections = atol(argv[3]), num_made = 0;
  double open_per_s = atof(argv[5]);
  duration_s = atof(argv[4]);
  max_requests = atol(argv[6]);
  answer_limit_s = atof(argv[7]);
  check_every = atol(argv[8]) > 0 ? atol(argv[8]) : 1;
  next_checked = atol(argv[9]);
  read_prompts(argv[10]);
  struct rlimit files;
  getrlimit(RLIMIT_NOFILE, &files);
  files.rlim_cur = files.rlim_max;
  setrlimit(RLIMIT_NOFILE, &files);
  signal(SIGPIPE, SIG_IGN);
  struct timespec wall;
  clock_gettime(CLOCK_REALTIME, &wall);
  stamp = (uint64_t)wall.tv_sec * 1000000000u + wall.tv_nsec;
  epoll_fd = epoll_create1(0);
  Stream *streams = calloc(connections, sizeof *streams);
  struct epoll_event found[512];
  began = now_s();
  double looked_at = began;
  for (;;) {
    double now = now_s();
    long due = open_per_s > 0 ? (long)((now - began) * open_per_s) + 1 : connections;
    if (due > connections) due = connections;
    /* A share at a time, so that answers are read meanwhile. */
    for (int i = 0; i < 64 && num_made < due && !is_over(now); i++) begin(&streams[num_made++], now);
    if (now - looked_at > 0.05) { /* what is paused, and what hangs */
      looked_at = now;
      for (long i = 0; i < num_made; i++) {
        Stream *s = &streams[i];
        if (!s->is_busy && s->not_before <= now && !is_over(now)) begin(s, now);
        else if (s->is_busy && now - s->sent_at > answer_limit_s) { note("no end within %g s", answer_limit_s); drop(s); end_of(s, "hung", now); }
      }
    }
    if (is_over(now) && !now_open) break;
    int count = epoll_wait(epoll_fd, found, 512, num_made < connections ? 1 : 50);
    for (int i = 0; i < count; i++) {
      Stream *s = found[i].data.ptr;
      if (!s->is_open) continue;
      if (found[i].events & EPOLLOUT && s->is_busy && s->out_at < s->out_len) send_more(s);
      if (s->is_open && found[i].events & (EPOLLIN | EPOLLHUP | EPOLLERR)) readable(s, (found[i].events & (EPOLLRDHUP | EPOLLHUP)) != 0);
    }
  }
  print_report(now_s() - began);
  return 0;
}
