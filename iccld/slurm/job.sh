# The life of a training job, attempt by attempt; sourced by the job script.
#
#     begin_attempt RUN_DIR   say where, and which attempt; end the job if it gets nowhere
#     launch COMMAND...       srun and the ranks; over when srun is, or when no rank has given a sign of life for long
#     end_attempt             finished: status 0; refused: status 2; else requeued, to go on from the newest checkpoint
#
# What decides is what rank 0 left in $state/outcome (0: finished, 85: stopped by a signal, position saved, 2: refused,
# 75: ended by the world) and which checkpoints there are. srun's own status is that of the rank that was first, or lost,
# and decides nothing. What the files in $state hold is data: it is compared, counted if it is a number, and never run;
# what is torn, missing or cannot be written is said, and stops no job.

set +eEfuC +o pipefail # whatever the lines of `setup` have set
shopt -u nullglob failglob
trap - ERR
IFS=$' \t\n'
max_stalled=${max_stalled:-3} # attempts in a row that fail without a newer checkpoint
max_cut_short=20              # the same of attempts that were preempted, or lost a node
requeue=${requeue:-yes}
lead_s=${lead_s:-300}                         # from USR1 to the time limit
ICCLD_START_S=${ICCLD_START_S:-1800}          # to the first sign of life: an image is fetched, an environment is cold
ASK_S=${ICCLD_ASK_S:-5}                       # between questions to a controller that does not answer
failed_setup=${failed_setup:-}
export ICCLD_SILENCE_S=${ICCLD_SILENCE_S:-60} # without a further one, from any rank
export ICCLD_GATHER_S=${ICCLD_GATHER_S:-900}  # from rank 0's first sign until the last rank has begun
for name in ICCLD_START_S ICCLD_SILENCE_S ICCLD_GATHER_S; do # they are counted with
    [[ ${!name} =~ ^[1-9][0-9]{0,8}$ ]] || { echo "iccld: $name=${!name} must be whole seconds" && exit 2; }
done

say() { echo "iccld: $*"; }

# FILE: the first line of a file of the job's state, as long as a word may be; nothing where it is no plain file.
recall() {
    [ -f "$state/$1" ] && [ ! -L "$state/$1" ] &&
        head -c 131071 "$state/$1" 2>/dev/null | tr -d '\0' | head -n 1
}

# FILE WORDS: replace it, so that whoever reads it sees the old words or the new ones.
keep() {
    local scratch=$state/$1.$restart.$$.tmp
    { rm -rf "$scratch" && printf '%s\n' "$2" >"$scratch" && mv -fT "$scratch" "$state/$1"; } 2>/dev/null && return
    rm -f "$scratch"
    say "$state/$1 cannot be written; make room on that disk, or give the job's user the right"
    return 1
}

# WORD: the number that it is, or 0.
number() { if [[ $1 =~ ^[0-9]{1,15}$ ]]; then echo $((10#$1)); else echo 0; fi; }

begin_attempt() {
    run_dir=$1 state=$1/slurm/job_$SLURM_JOB_ID restart=$(number "${SLURM_RESTART_COUNT:-0}")
    stalled=0 spared=0 attempt=$restart # the attempt that a node is blamed for
    # Of an array's elements, the last has the number of the array: by it, scontrol would requeue them all.
    id=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID} id=${id:-$SLURM_JOB_ID}
    for place in "$1/slurm" "$state" "$state/alive"; do # what lies behind a link is not the job's to delete
        [ ! -L "$place" ] || { say "$place is a link; remove it, or make all of $1 the link"; exit 2; }
    done
    alive=$state/alive/$restart # what an earlier attempt left behind may still write into its own
    trap 'say "the job was asked to end; the ranks save"' TERM # and go on waiting for them
    export ICCLD_OUTCOME=$state/outcome ICCLD_ALIVE=$alive
    ICCLD_HOSTS=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | paste -sd " ")
    ICCLD_ATTEMPT_BEGAN=$(date +%s)
    export ICCLD_HOSTS ICCLD_ATTEMPT_BEGAN
    log=$(readlink -f "/proc/$$/fd/1")
    rm -rf "$alive"
    # What lies here at a job's beginning was left by one of another cluster, or of a controller that has counted anew.
    [ "$restart" != 0 ] || rm -rf "$state"/{outcome,progress,stalled,running_on,log_begin}
    if ! mkdir -p "$alive"; then # a full disk, or a file system that is away
        say "$alive cannot be made; make room on that disk, or mend its mount"
        [ "$restart" -lt "$max_cut_short" ] || give_up "$restart"
        requeue
    fi
    say "job $SLURM_JOB_ID, restart $restart, on $SLURM_JOB_NODELIST, $(date '+%F %T')"
    before=$(recall running_on)
    if [[ $before =~ ^[A-Za-z0-9._,[-]+[]A-Za-z0-9._,[-]*$ ]]; then # the attempt before this one was cut off
        say "the attempt on $before was cut off"
        attempt=$((restart - 1))
        blame_node_failure || blame_nodes_that_are_down "$before"
        attempt=$restart
    fi
    keep log_begin "$(stat -c %s "$log" 2>/dev/null)"
    [ "$(recall outcome)" != 0 ] || { say "finished before; nothing to do"; exit 0; }
    rm -rf "$state/outcome"
    count_stalled
    if [ -n "$failed_setup" ]; then # wrong from the start, or a file server that is away
        say "this line of the setup failed: $failed_setup"
        [ "$restart" != 0 ] || { say "refused; not started again"; exit 2; }
        requeue
    fi
    say "going on from: ${progress_before:-the beginning}"
    keep running_on "$SLURM_JOB_NODELIST"
}

# What the job has achieved: newest checkpoint and model of each stage, scores.
progress() {
    (
        cd "$run_dir" || exit
        for stage in */; do # a stage may have any name
            [ ! -f "$stage/checkpoints/latest" ] || echo -n "$stage$(head -c 100 "$stage/checkpoints/latest" | tr -d '\0\n') "
            [ ! -e "$stage/final" ] || echo -n "${stage}final "
        done
        for report in report/*; do [ ! -e "$report" ] || echo -n "$report "; done
    ) | tr -cd 'A-Za-z0-9_./ -' # into logs, from a folder that others may have made
}

# Attempts since the newest checkpoint, those that failed and those that were cut short. What is written down at the
# beginning holds if this one is cut off; `end_attempt` knows better.
count_stalled() {
    local failed cut_short
    progress_before=$(progress)
    if [ -e "$state/progress" ] && [ "$(digest "$progress_before")" = "$(recall progress)" ]; then
        read -r failed cut_short <<<"$(recall stalled)"
        stalled=$(number "$failed") spared=$(number "$cut_short")
    fi
    give_up_if_stalled "$stalled" "$spared"
    keep progress "$(digest "$progress_before")"
    keep stalled "$stalled $((spared + 1))"
}

# WORDS: of one line and length, for the state.
digest() { sha256sum <<<"$1" | cut -c 1-64; }

give_up_if_stalled() {
    [ "$1" -lt "$max_stalled" ] || give_up "$max_stalled"
    [ "$2" -lt "$max_cut_short" ] || give_up "$max_cut_short"
}

give_up() {
    say "$1 attempts without a newer checkpoint; not started again. Mend what the log names, and submit again."
    rm -f "$state/running_on"
    exit 1
}

launch() {
    local signs last="" silent=0 limit_s=$ICCLD_START_S poll_s=$((ICCLD_SILENCE_S < 50 ? 1 : 5)) waiting
    status=1
    events_begin=$(number "$(stat -c %s "$run_dir/events.jsonl" 2>/dev/null)")
    "$@" &
    launched=$!
    while kill -0 "$launched" 2>/dev/null; do
        sleep "$poll_s" &
        waiting=$!
        wait -n "$launched" "$waiting"
        status=$?
        kill "$waiting" 2>/dev/null
        signs=$(cat "$alive"/* 2>/dev/null)
        silent=$((silent + poll_s))
        if [ "$signs" != "$last" ]; then last=$signs silent=0 limit_s=$ICCLD_SILENCE_S; fi
        if [ "$silent" -gt "$limit_s" ]; then # a step daemon that was killed: srun would wait for ever
            say "no rank has given a sign of life for $limit_s s; srun is left behind"
            kill -KILL "$launched"
            wait "$launched" 2>/dev/null
            status=137
            return
        fi
    done
    wait "$launched" 2>/dev/null # the status seen last may be that of a wait which a signal ended
    waiting=$?
    [ "$waiting" = 127 ] || status=$waiting # 127: it was seen
}

end_attempt() {
    rm -rf "$state/running_on"
    case $(recall outcome) in
    0)
        say "finished"
        exit 0
        ;;
    2) # what is wrong on the first attempt will be wrong on the next, unless it has worked for a while
        [ "$restart$(progress)" != "0$progress_before" ] || { say "refused; not started again"; exit 2; }
        say "refused, after it has worked; there is: $(progress)"
        stalled=$((stalled + 1))
        ;;
    85)
        say "stopped by a signal; saved: $(progress)"
        blame_node_failure
        spared=$((spared + 1))
        ;;
    *)
        say "ended with status $status; there is: $(progress)"
        if blame_node_failure; then spared=$((spared + 1)); else blame_first_to_end; stalled=$((stalled + 1)); fi
        ;;
    esac
    compare_lead
    keep stalled "$stalled $spared" || [ "$restart" -lt "$max_cut_short" ] || stalled=$max_stalled # SLURM's own count
    [ "$(progress)" != "$progress_before" ] || give_up_if_stalled "$stalled" "$spared"
    requeue
}

# The lead was chosen before saves could be measured, or when they were shorter.
compare_lead() {
    local newest seconds needed
    newest=$(ls -t "$run_dir"/*/checkpoints/step_*[0-9]/manifest.json 2>/dev/null | head -n 1)
    [[ $(grep -m 1 -o '"save_s": *[0-9]*' "$newest" 2>/dev/null) =~ ([0-9]+)$ ]] || return 0
    seconds=$(number "${BASH_REMATCH[1]}") needed=$((60 + 3 * seconds))
    [ "$needed" -le "$(number "$lead_s")" ] ||
        say "a save took $seconds s: a signal $lead_s s before the limit is late; submit again, with --lead-s $needed"
}

requeue() {
    local now try said=
    [ "$requeue" = yes ] || { say "not requeued, as was asked for; submit again, and it goes on"; exit 1; }
    for try in {1..5}; do # a backup controller takes over after two minutes
        now=$(job_state)
        case $now in
        RUNNING)
            [ "$said" ] || say "requeued"
            said=yes
            trap "" TERM
            if scontrol requeue "$id"; then
                leave_out_failing
                sleep 60 && exit 1 # ended by the requeue
            fi
            sleep $((12 * ASK_S))
            ;;
        "") ;;
        *) say "not requeued: $now"; exit 1 ;; # cancelled, or requeued already
        esac
    done
    if [ "$said" ]; then say "could not be requeued; submit again, and it goes on"; else
        say "not requeued, as SLURM does not answer; submit again, and it goes on"
    fi
    exit 1
}

# A node that ended two attempts, as `iccld submit` counts them, gets no third: an idle node would be chosen again.
leave_out_failing() {
    local nodes before try
    nodes=$(cut -f 1,3 "$run_dir/slurm/failed_nodes" 2>/dev/null | sort -u | cut -f 1 | uniq -d |
        grep -xE '[A-Za-z0-9][A-Za-z0-9._-]{0,252}')
    [ -n "$nodes" ] || return
    before=$(scontrol show job "$id" --oneliner | sed -n 's/.* ExcNodeList=\([^ (][^ ]*\).*/\1/p')
    [ -z "$before" ] || before=$(scontrol show hostnames "$before")
    nodes=$(sort -u <<<"$nodes"$'\n'"$before" | grep . | paste -sd ,)
    [ "$nodes" != "$(sort -u <<<"$before" | paste -sd ,)" ] || return
    for try in 1 2 3; do
        scontrol update jobid="$id" ExcNodeList="$nodes" && say "the next attempt is not on $nodes" && return
        sleep "$ASK_S"
    done
}

# SLURM's word; asked for a minute, as a controller that is restarted does not answer.
job_state() {
    local answer try
    for try in {1..12}; do
        answer=$(scontrol show job "$id" --oneliner | grep -o 'JobState=[A-Z_]*' | head -n 1)
        [ -z "$answer" ] || break
        sleep "$ASK_S"
    done
    echo "${answer#JobState=}"
}

# NODE WHY: a line that the next submit counts.
blame() {
    local list=$run_dir/slurm/failed_nodes
    { [ ! -e "$list" ] || [ -f "$list" ]; } && [ ! -L "$list" ] &&
        printf '%s\t%s\tjob %s, restart %s\t%s\n' "$1" "$(date '+%F %T')" "$SLURM_JOB_ID" "$attempt" "$2" \
            2>/dev/null >>"$list" || say "$list cannot be written"
    say "node $1 failed: $2"
}

# What the attempt that ended last has added to the log.
own_log() { tail -c "+$(($(number "$(recall log_begin)") + 1))" "$log" 2>/dev/null; }

# SLURM's word; several nodes are one expression, as gpu[01-02].
blame_node_failure() {
    local nodes node
    nodes=$(own_log | sed -n 's/^srun: error: Node failure on \([^[:space:]]*\).*/\1/p' | sort -u)
    [ -n "$nodes" ] || return 1
    for node in $(scontrol show hostnames "$(echo "$nodes" | paste -sd ,)"); do
        blame "$node" "down while the job ran on it"
    done
}

# A watchdog or the check before the start has named ranks of one node; else srun names that of a task which was killed
# or met a bus error. Only the first: it ends the others. What ended by itself, by a signal that asks, or for want of
# memory, says nothing of the node.
blame_first_to_end() {
    local named hosts first
    named=$(tail -c "+$((events_begin + 1))" "$run_dir/events.jsonl" 2>/dev/null |
        grep -E '"event": "(stopped|unfit)"' | grep -v '"sure": false')
    if [ -n "$named" ]; then
        hosts=$(echo "$named" | sed -n 's/.*"host": "\([A-Za-z0-9._-]*\)".*/\1/p' | sort -u)
        [ -z "$hosts" ] || [ "$(echo "$hosts" | wc -l)" != 1 ] || blame "$hosts" "$(echo "$named" | head -n 1)"
        return
    fi
    first=$(own_log | grep -m 1 -E '^srun: error: [^:]+: tasks? [0-9,-]+: |CANCELLED AT|oom.kill')
    if [[ $first =~ ^srun:\ error:\ ([A-Za-z0-9._-]+):\ (task\ [0-9]+:\ (Killed|Bus\ error).*) ]]; then
        blame "${BASH_REMATCH[1]}" "${BASH_REMATCH[2]}"
    fi
}

blame_nodes_that_are_down() {
    local node
    for node in $(sinfo -h -N -n "$1" -t down,drain,fail,no_respond -o %N 2>/dev/null | sort -u); do
        blame "$node" "down while the job ran on it"
    done
}
