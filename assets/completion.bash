# The options of `specforge <stage>` and of the scripts for bash's tab key: eval "$(specforge -sc install=bash)".
# Hydra's own would run every script that stands behind `python`, and knows no stage before the options.
_specforge()
{
    local stages="prefetch prep regen preprocess train export bench report chat pretrain sft"
    local flags='(status|-m|--multirun|--no-draft|(--config-dir|-cd)[ =][^ ]+)'  # no options
    local line="${COMP_LINE:0:COMP_POINT}" choices words stage conf=()
    read -ra words <<< "$line"
    stage="${words[1]##*/}"
    if [[ "${line% *}" != *" "* && "$line" != *python* ]]; then
        choices=$stages
        compopt +o nospace
    elif [[ "${line% *}" == *" "* && " $stages " == *" ${stage%.py} "* ]]; then
        [[ "$line" =~ " "(--config-dir|-cd)[\ =]([^\ ]+)" " ]] && conf=(-cd "${BASH_REMATCH[2]}")
        line=$(sed -E ":again; s/ $flags / /; t again" <<< "$line.")
        line="${line%.}"
        choices=$(COMP_LINE="${line#* }" "${words[@]:0:2}" "${conf[@]}" -sc query=bash 2> /dev/null)
    else
        compopt +o nospace
    fi
    COMPREPLY=($(compgen -W "$choices" -- "${line##* }"))
}
COMP_WORDBREAKS=${COMP_WORDBREAKS//=}
complete -o nospace -o default -F _specforge specforge python python3
