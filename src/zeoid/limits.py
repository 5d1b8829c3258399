"""Every bound there is: sizes, queues, waits and retries, each with a name, a unit and a reason.

Owns the default values only. Whoever enforces a limit takes it as an argument whose default comes from
here, so that tests and configurations can choose another. A table in docs/limits.md lists them all.
"""

from typing import Final

# Wire -------------------------------------------------------------------------------------------------

#: The largest message either side accepts, checked on its length prefix before any of it is kept.
FRAME_BYTES: Final = 256 * 1024 * 1024
#: The largest message before a peer has registered: an offer, an answer, `register`.
HANDSHAKE_FRAME_BYTES: Final = 64 * 1024
#: How deep lists, tuples and dicts may be nested in a message. Real messages need five levels.
NESTING: Final = 64
#: Values in a message of a client that is longer than `MESSAGE_COUNTED_BYTES`: an empty dictionary is one
#: byte on the wire and 64 in memory. Real messages that are long have long records, and few values.
MESSAGE_VALUES: Final = 100_000
MESSAGE_COUNTED_BYTES: Final = 256 * 1024
#: Opcodes of a client's pickle that is longer than `PICKLE_COUNTED_BYTES`: each is a call in Python.
PICKLE_OPCODES: Final = 200_000
PICKLE_COUNTED_BYTES: Final = 64 * 1024
#: Digits of the longest integer a message may hold (an oid has 64 bits).
INTEGER_BYTES: Final = 32

#: The largest message on a blob connection: what goes beside the blobs is short.
BLOB_FRAME_BYTES: Final = 4096
#: A blob of up to this size is sent in the reply that tells its size, and needs no leave to come.
BLOB_INLINE_BYTES: Final = 64 * 1024

# Server -----------------------------------------------------------------------------------------------

#: Connections are refused, and no blob is opened, when no more descriptors than these are left, or than half
#: of all: the data file, its journal and up to 100 connections that are accepted at once need some.
DESCRIPTORS_KEPT: Final = 160
#: Connections that have registered, blob connections not among them …
CONNECTIONS: Final = 5000
#: … and those of one identity: of a certificate's name, a token's, or of an address where there is no name.
CONNECTIONS_PER_IDENTITY: Final = 1000
#: Connections that have not registered yet, of all addresses and of one: more, and the oldest is closed.
NEWCOMERS: Final = 1000
NEWCOMERS_PER_ADDRESS: Final = 250
#: What is held for clients in all: messages of which a part has come, transactions that are not committed,
#: what they don't read. Beyond that, whoever holds most is dropped.
HELD_BYTES: Final = 2 * 1024 * 1024 * 1024
#: … which is looked at whenever such a part of it has come …
HELD_SHARE: Final = 1 / 8
#: … in pieces, each as large as this at least.
HELD_PIECE_BYTES: Final = 32 * 1024
#: A connection is closed that has sent nothing for this long: clients of ZEO send heartbeats every minute …
IDLE_S: Final = 15 * 60.0
#: … and so many connections are looked at in one tick.
IDLE_ASKED: Final = 50
#: Lines in the log about what is wrong with clients, and in the audit log about refusals, of one connection …
REFUSALS_TOLD_PER_CONNECTION: Final = 20
#: … of one address …
REFUSALS_TOLD_PER_ADDRESS: Final = 200
#: … and of all …
REFUSALS_TOLD: Final = 500
#: … in this time; how many more there were is told after that …
REFUSALS_MINUTE_S: Final = 60.0
#: … and so many addresses are told apart.
REFUSALS_ADDRESSES: Final = 1000
#: Calls of one connection that are carried out before others get their turn.
CALLS_PER_TURN: Final = 200
#: A connection that has not registered after this time is closed.
HANDSHAKE_TIMEOUT_S: Final = 10.0
#: A prepared transaction that its client does not finish in this time is aborted: others wait for it.
TRANSACTION_TIMEOUT_S: Final = 30.0
#: A vote that waited this long for the transactions before it is answered with a conflict error, so that
#: its client tries again.
VOTE_WAIT_S: Final = 300.0
#: Above this much unsent output the server stops reading from a connection …
OUTPUT_HIGH_WATER_BYTES: Final = 1024 * 1024
#: … and above this much it drops the connection: the peer does not read its invalidations.
OUTPUT_LIMIT_BYTES: Final = 512 * 1024 * 1024
#: Requests of one connection that wait in threads (undo log, pack, iteration); more are refused.
SLOW_REQUESTS_PER_CONNECTION: Final = 16
#: … of which so many at the same time: there are threads for some more.
SLOW_REQUESTS_AT_ONCE: Final = 2
#: Transaction and record iterators one connection may hold open.
ITERATORS_PER_CONNECTION: Final = 1000
#: Transactions one connection may have open: a stock client has one.
TRANSACTIONS_PER_CONNECTION: Final = 64
#: Record data of one transaction. It is held in memory until the transaction is voted on.
TRANSACTION_BYTES: Final = 1024 * 1024 * 1024
#: Entries of one answer about history or undo, which are in memory together.
UNDO_ENTRIES: Final = 100_000
#: Object ids handed out in one request.
NEW_OIDS: Final = 1000
#: Transactions made durable together, and the size of their data: while one batch is written the next one
#: gathers.
BATCH_TRANSACTIONS: Final = 1000
BATCH_BYTES: Final = 2 * 1024 * 1024
#: Room in a data file is reserved ahead in steps of this size.
RESERVE_BYTES: Final = 8 * 1024 * 1024
#: A checkpoint of a data file is made when the journal has grown by so much since the last one …
CHECKPOINT_BYTES: Final = 32 * 1024 * 1024
#: … or after this time, if anything was committed. A recovery after a crash reads no more than that.
CHECKPOINT_S: Final = 30.0
#: Object ids are marked as handed out in blocks of this size: one write to the disk for each.
OID_BLOCK: Final = 10_000
#: A transaction of more operations is prepared in a thread, so that nobody waits for it.
PREPARE_INLINE_OPERATIONS: Final = 200
#: A segment of the commit journal: it is written full of zeros ahead of need, and reused after a checkpoint …
JOURNAL_SEGMENT_BYTES: Final = 16 * 1024 * 1024
#: … but no more than so many wait for that.
JOURNAL_SPARES: Final = 4
#: A pack tells how far it has come, and looks whether it is to go on, after so many headers of records.
PACK_REPORT_RECORDS: Final = 100
#: What was committed while a file was packed is copied while others commit, until no more than this is left …
PACK_LAST_BYTES: Final = 64 * 1024
#: … or in so many rounds. The last of it is copied while commits wait.
PACK_ROUNDS: Final = 20
#: Blobs that arrive are written in pieces of this size at least …
BLOB_PIECE_BYTES: Final = 256 * 1024
#: … and put on the disk in steps of this size, two of which may be under way. Clients' caches have the same.
BLOB_WRITEBACK_BYTES: Final = 2 * 1024 * 1024
#: What is on the disk of a blob beyond this length is not kept in the system's memory while it arrives.
BLOB_CACHED_BYTES: Final = 64 * 1024 * 1024
#: A client's blobs are read from its connection as long as no more than this waits to be written.
BLOB_QUEUE_BYTES: Final = 4 * 1024 * 1024
#: What each message of a blob counts for in that besides its content: blobs may be empty, and many.
BLOB_MESSAGE_BYTES: Final = 2048
#: While more than this waits to be sent to a client, nothing of a blob is added: replies wait behind it.
BLOB_OUTPUT_BYTES: Final = 256 * 1024
#: Blobs sent to one client at a time, piece by piece in turn.
BLOB_DOWNLOADS_PER_CONNECTION: Final = 4
#: … and as many more may wait for that; others are refused. Each thread of a client waits for one blob only.
BLOB_DOWNLOADS_WAITING: Final = 1000
#: Threads of a server that read and write blobs.
BLOB_THREADS: Final = 4
#: No blob is taken that would leave less room on the disk: transactions need some.
BLOB_FREE_BYTES: Final = 64 * 1024 * 1024
#: Records that are looked at when a data file is opened without a directory for blobs, to say if it has some:
#: the newest ones, and as many from all over the file.
BLOB_SAMPLE_RECORDS: Final = 200
#: Blob connections that are served at once, each by a thread; of one client there are no more, either.
BLOB_STREAMS: Final = 16
#: What a client is given to open one with is good for this long …
BLOB_TOKEN_S: Final = 30.0
#: … and a client has no more of them.
BLOB_TOKENS_PER_CONNECTION: Final = 64
#: Blob connections in all, those that wait for a thread among them.
BLOB_STREAMS_IN_ALL: Final = 1000
#: The largest blob that is taken.
BLOB_BYTES: Final = 1024 * 1024 * 1024 * 1024
#: A blob connection is closed when it was without a request, or when no byte of a blob moved, for this long.
BLOB_STREAM_IDLE_S: Final = 30.0
#: What is still read of a blob that can't be stored, so that its client hears why.
BLOB_DISCARD_BYTES: Final = 64 * 1024 * 1024
#: Blobs of one client that are here and that no transaction has yet; more are refused.
BLOBS_UNCLAIMED: Final = 10_000
#: Transactions of one client that are over: what still arrives for one of them is nobody's.
BLOB_TRANSACTIONS_OVER: Final = 1000
#: Client-made ids of transactions remembered, committed ones and refused ones each, for `outcome`.
OUTCOMES: Final = 10_000
#: Rounds of client-side conflict resolution. A stock client that still has conflicts after its ninth vote
#: would go on to finish, so the ninth is answered with the conflict error itself.
RESOLUTION_ROUNDS: Final = 9
#: What the invalidation log remembers, so that a client that was away can be brought up to date.
INVALIDATION_LOG_TRANSACTIONS: Final = 100_000
INVALIDATION_LOG_BYTES: Final = 32 * 1024 * 1024
#: Transactions read back from the storage at start to fill the log.
INVALIDATION_LOG_AT_START: Final = 10_000
#: … as long as they have no more records than this: that takes half a second.
INVALIDATION_LOG_RECORDS_AT_START: Final = 100_000
#: Clients are told of the storage's new size this often.
INFO_S: Final = 1.0
#: A database that others write to is asked this often for what they committed, besides at every commit …
POLL_S: Final = 1.0
#: … and for its size no more often than this.
FOREIGN_INFO_S: Final = 30.0
#: How often deadlines are looked at.
TICK_S: Final = 0.25
#: How long a stop waits for the connections to drain.
STOP_TIMEOUT_S: Final = 5.0
#: Threads for requests that read much: undo log, history, iteration.
SLOW_REQUEST_THREADS: Final = 4
#: Threads that read one storage that may have to wait, such as a database.
READ_THREADS: Final = 8
#: Its loads of one connection that are under way; what comes after them stays unread until one has ended.
READS_PER_CONNECTION: Final = 1000
#: Objects of one bulk load. A server answers it in one go: half a millisecond from a data file.
BULK_LOAD_OIDS: Final = 100
#: Data of the reply to one: what does not fit is asked for again. (One object always fits.)
BULK_LOAD_BYTES: Final = 256 * 1024
#: A load in a thread that was overtaken by a commit to the same object is done again, so often at most.
READ_TRIES: Final = 10

# TLS --------------------------------------------------------------------------------------------------

#: What one TLS record carries at most (RFC 8446, 5.1): reading so much takes a whole one.
TLS_RECORD_BYTES: Final = 16 * 1024
#: Whoever has said nothing after this time is a client without TLS, which waits for the server to begin.
TLS_SILENCE_S: Final = 5.0
#: What may wait to be sent to a peer that makes our side answer, but sends nothing of use.
TLS_ANSWERS_BYTES: Final = 64 * 1024
#: Blobs are encrypted in pieces of this size, and decrypted from as much.
TLS_PIECE_BYTES: Final = 256 * 1024
#: The files of certificates are looked at for changes no more often than this.
TLS_RELOAD_S: Final = 1.0
#: The largest file of certificates, keys or revoked certificates that is read.
TLS_FILE_BYTES: Final = 16 * 1024 * 1024
#: How long a client that met the wrong name asks a server which names it has …
TLS_NAMES_S: Final = 3.0
#: … of which a message tells so many.
TLS_NAMES_TOLD: Final = 5

# Security ---------------------------------------------------------------------------------------------

#: The files that say who may do what are looked at for changes no more often than this.
RULES_RELOAD_S: Final = 1.0
#: The largest file of tokens, or of rules, that is read.
RULES_BYTES: Final = 1024 * 1024
#: Certificates whose names and roles are remembered.
CERTIFICATES_KNOWN: Final = 1000
#: The longest token that is looked at. Ours have up to 114 characters.
TOKEN_CHARACTERS: Final = 256
#: Different tokens that one address may show in vain within a minute; after that it is refused unheard.
FAILED_LOGINS_PER_MINUTE: Final = 10
#: … and all addresses together: after that, each that has failed in this minute is refused unheard.
FAILED_LOGINS_OF_ALL_PER_MINUTE: Final = 300
#: Addresses whose failures are remembered; more, and the one that failed first is forgotten.
FAILED_LOGIN_ADDRESSES: Final = 1000
#: A name or a reason in the audit log is cut after so many characters …
AUDIT_CHARACTERS: Final = 200
#: … and a list after so many entries.
AUDIT_ENTRIES: Final = 100

# Client -----------------------------------------------------------------------------------------------

#: The deadline of every call, and of waiting for a connection.
WAIT_TIMEOUT_S: Final = 30.0
#: The deadline of one connection attempt, handshake included. The next address follows.
CONNECT_TIMEOUT_S: Final = 10.0
#: Closing a storage waits so long for its background thread, which may be in a connection attempt.
CLOSE_TIMEOUT_S: Final = 1.0
#: Packing may take hours. A dead server is noticed by the connection's own time-out, not by this one.
PACK_TIMEOUT_S: Final = 7 * 24 * 3600.0
#: `zeoid pack` asks this often how far the pack has come …
PACK_POLL_S: Final = 0.25
#: … and says so this often where it does not write to a terminal.
PACK_TELL_S: Final = 10.0
#: The waits between rounds of connection attempts grow from the first to the last, with jitter.
RECONNECT_FIRST_S: Final = 0.05
RECONNECT_LAST_S: Final = 5.0
#: A client that had to take a read-only server looks for a writable one this often.
WRITER_POLL_S: Final = 1.0
#: A server whose last transaction is older than one that was seen before may be late. If all of them are for
#: this long, the database was restored from a back-up, and what is known of it is forgotten …
BEHIND_S: Final = 10.0
#: … and if others of them can't be reached, after this long.
BEHIND_OTHERS_GONE_S: Final = 60.0
#: No foreground call for this long, and the background thread reads the socket.
IDLE_BEFORE_BACKGROUND_S: Final = 0.05
#: A heartbeat is sent after this much silence; a peer that does not acknowledge it is given up.
HEARTBEAT_S: Final = 30.0
#: TCP gives up a connection whose data was not acknowledged for this long (where the system can be told).
UNACKNOWLEDGED_MS: Final = 30_000
#: One-way messages of a transaction are gathered up to this size before they are sent.
GATHER_BYTES: Final = 128 * 1024
#: Who waits for the reply to another thread's load looks so often whether that was given up.
FOLLOW_TICK_S: Final = 0.1
#: Loads in flight during a prefetch.
PREFETCH_WINDOW: Final = 500
#: A load that takes longer comes over a slow link, and after so many in a row there is reading ahead.
READ_AHEAD_SLOW_S: Final = 0.0005
READ_AHEAD_SLOW_LOADS: Final = 8
#: Records that may be read ahead: at first, at most at a time, for each load and for each use of one.
READ_AHEAD_FIRST: Final = 32
READ_AHEAD_MOST: Final = 1000
READ_AHEAD_CREDIT_OF_A_LOAD: Final = 0.25
READ_AHEAD_CREDIT_OF_A_USE: Final = 4
#: References are followed through so many records that were not used yet.
READ_AHEAD_DEPTH: Final = 2
#: A message for what is not urgent is made after so many uses.
READ_AHEAD_USES: Final = 100
#: Trails that are followed, and the objects of one.
READ_AHEAD_TRAILS: Final = 8
READ_AHEAD_TRAIL: Final = 4_000
#: What came ahead and was not used may take such a part of the object cache.
READ_AHEAD_SHARE: Final = 1 / 8
#: The in-memory object cache.
CACHE_BYTES: Final = 20 * 1024 * 1024
#: A cache that the processes of a host share, and the least that it can be.
SHARED_CACHE_BYTES: Final = 256 * 1024 * 1024
SHARED_CACHE_LEAST_BYTES: Final = 4 * 1024 * 1024
#: Of its file, each of two generations may take so much. What is left is for changing it.
SHARED_CACHE_GENERATION_PERCENT: Final = 42
#: A record that is larger than one such part of the file is not kept, nor is more written at once.
SHARED_CACHE_PARTS: Final = 64
#: What was loaded is put there together, after this long …
SHARED_CACHE_FLUSH_S: Final = 0.05
#: … so many records at once; until then it is in the process's memory, which takes this much at most.
SHARED_CACHE_BATCH: Final = 200
SHARED_CACHE_WAITING_BYTES: Final = 8 * 1024 * 1024
#: How long another process may have the cache's lock: what was loaded waits until later after this time …
SHARED_CACHE_PUT_S: Final = 0.1
#: … for a change that was committed this process can't wait longer, and leaves the cache …
SHARED_CACHE_LOCK_S: Final = 1.0
#: … and it takes no longer to make or open one.
SHARED_CACHE_OPEN_S: Final = 2.0
#: The lock is tried this often.
SHARED_CACHE_LOCK_POLL_S: Final = 0.0005
#: A process opens a cache so often, and does without it after that …
SHARED_CACHE_TRIES: Final = 4
#: … unless it went well for so long.
SHARED_CACHE_TRIES_S: Final = 600.0
#: Threads of a process that read from it at the same moment; more find nothing …
SHARED_CACHE_READS_AT_ONCE: Final = 8
#: … and places for all processes' threads.
SHARED_CACHE_READERS: Final = 2048
#: Past revisions of one object that it keeps, for transactions that began before the newest one.
ENDED_REVISIONS: Final = 16
#: Invalidations remembered to correct replies that were under way when they arrived.
RECENT_INVALIDATIONS: Final = 256
#: A thread that waits for a reply looks at its deadline this often.
RECEIVE_TICK_S: Final = 1.0
#: The size of one read from a socket. Larger ones make the allocator ask the system for memory each time.
READ_BYTES: Final = 64 * 1024

# Blobs of a client ------------------------------------------------------------------------------------

#: A blob goes to a server in messages of this size, as from ZEO's client (larger ones its server takes more
#: slowly). Between two of them other threads' messages go out.
BLOB_CHUNK_BYTES: Final = 59_000
#: Blob connections of one storage to a server that has the extension …
BLOB_CONNECTIONS: Final = 4
#: … each of which is closed when nothing went over it for this long.
BLOB_CONNECTION_IDLE_S: Final = 10.0
#: … and opened only if the server has a thread for it in this time …
BLOB_CONNECTION_WAIT_S: Final = 3.0
#: … else blobs go as messages on the client's own connection for this long, before the next try.
BLOB_CONNECTION_AGAIN_S: Final = 10.0
#: A download that breaks off with its connection is begun so often.
BLOB_DOWNLOADS: Final = 3
#: Whoever removes a file from the cache has it locked for two system calls. It is waited for in steps of this
#: size, so many times; after that it is taken for stopped, and the blob is downloaded anew.
BLOB_LOCK_POLL_S: Final = 0.01
BLOB_LOCK_TRIES: Final = 500
#: Another process's download is looked at this often.
BLOB_PART_POLL_S: Final = 0.1
#: A blob that was handed out stays in the cache for this long: its path may be about to be opened …
BLOB_GRACE_S: Final = 60.0
#: … and only this long when there is twice as much as the cache may hold.
BLOB_SHORT_GRACE_S: Final = 10.0
#: Files of uploads and downloads that are older than this were left by processes that were killed.
BLOB_LEFTOVER_S: Final = 24 * 3600.0

# Retries ----------------------------------------------------------------------------------------------

#: How often `zeoid.retry` runs a transaction at most: three times, as is usual with ZODB.
RETRY_TRIES: Final = 3
#: The wait before a new try is chosen at random between 0 and a bound that doubles from the first to the
#: last, so that those who met in a conflict do not meet again.
RETRY_FIRST_WAIT_S: Final = 0.05
RETRY_LAST_WAIT_S: Final = 2.0

# Copying ----------------------------------------------------------------------------------------------

#: Blobs are read and written in pieces of this size.
COPY_PIECE_BYTES: Final = 1024 * 1024
#: Progress is shown this often on a terminal …
COPY_TERMINAL_S: Final = 0.2
#: … and as a line this often elsewhere.
COPY_LINE_S: Final = 10.0
#: Differences that are told one by one, and missing blobs; the others are counted.
COPY_TOLD: Final = 10

# Certificates -----------------------------------------------------------------------------------------

#: A certificate is valid for so many days, unless `--days` says otherwise: a year, and a month to renew it …
CERTIFICATE_DAYS: Final = 397
#: … and this is the most that can be asked for.
CERTIFICATE_DAYS_MOST: Final = 3650
#: `zeoid certs list` marks what is valid for no longer than this.
CERTIFICATE_SOON_DAYS: Final = 30
#: Certificates begin so much before they are made: clocks differ.
CERTIFICATE_BACKDATED_S: Final = 300
#: A certificate authority, ten years …
AUTHORITY_DAYS: Final = 3653
#: … and as long a list of revoked certificates, from each time that it is made: nobody connects after that.
REVOCATION_LIST_DAYS: Final = 3653
#: Characters of a certificate's name: what X.509 allows.
CERTIFICATE_NAME_LENGTH: Final = 64
#: Names and addresses of one server.
CERTIFICATE_HOSTS: Final = 100
#: Waiting for another command that changes the same directory of certificates; it is looked at this often.
CERTIFICATES_LOCK_S: Final = 10.0
CERTIFICATES_LOCK_POLL_S: Final = 0.02
